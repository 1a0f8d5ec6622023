"""Training on texts alone between the pairs of an image and a text."""

"""Each text pools the image for itself, with several captions an image (FLAIR)."""

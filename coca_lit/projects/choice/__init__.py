"""The choice between right and wrong texts for an image, and objects that captions name and the image does not show."""

"""Captioned images: readers, transforms, loaders that resume exactly, and one DataModule per data set."""

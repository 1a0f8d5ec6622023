"""Captioned images: readers, transforms, loaders that resume exactly, and one DataModule per data set."""

import os

# Read by webdataset when it is first imported: it then refuses shell commands as URLs and never unpickles a member.
os.environ["WDS_SECURE"] = "1"

"""Captioned images: data sets as functions that return records, loaders that resume exactly, and DataModules."""

import os

# Read by webdataset when it is first imported: it then refuses shell commands as URLs and never unpickles a member.
os.environ["WDS_SECURE"] = "1"

from coca_lit.data.records import ImageFile, Record  # webdataset may be imported only after this

__all__ = ["ImageFile", "Record"]

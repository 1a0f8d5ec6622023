"""Captioned images: data sets as functions that return records, loaders that resume exactly, and DataModules."""

from coca_lit.data.records import ImageFile, Record

__all__ = ["ImageFile", "Record"]

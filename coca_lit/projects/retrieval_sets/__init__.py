"""Retrieval with many right answers and by captions of several sentences."""

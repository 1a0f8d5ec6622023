"""Captions scored by the meaning of sentences: the cosine of a caption and its references in a sentence encoder."""

"""Captions from a model: greedy, beam search, sampling."""

"""Distillation from larger models whose embeddings are stored with the samples."""

"""Metrics as plain functions: captions or features in, a dictionary of numbers out. No model, no trainer, no files."""

"""Weights in and out of a model: our files, OpenCLIP's, CLIP towers, interpolation, LoRA."""

"""Weights in and out of a model: names, our files, OpenCLIP's, CLIP towers, interpolation, LoRA."""

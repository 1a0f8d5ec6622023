"""Captions alone teach the image encoder: predicted in parallel (CapPa), and behind prompts that name their kind."""

"""A reward for self-critical training: what a reader of the caption alone knows of the scene (CapRL)."""

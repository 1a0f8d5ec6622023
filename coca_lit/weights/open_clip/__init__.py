"""OpenCLIP's files: weights of its captioners from and to ours, weights of its CLIP (`tensors`), and its configs."""

from coca_lit.weights.open_clip.tensors import clip_from_open_clip, from_open_clip, is_clip, to_open_clip

__all__ = ["clip_from_open_clip", "from_open_clip", "is_clip", "to_open_clip"]

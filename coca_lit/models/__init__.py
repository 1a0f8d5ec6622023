"""The networks, in plain PyTorch and timm."""

from coca_lit.models.clip import CLIP
from coca_lit.models.coca import CoCa, CoCaOutput, text_lengths
from coca_lit.models.generation.generate import Captions
from coca_lit.models.presets import PRESETS, create_model

DualEncoder = CoCa | CLIP  # what embeds images and texts in a common space

__all__ = ["CLIP", "PRESETS", "Captions", "CoCa", "CoCaOutput", "DualEncoder", "create_model", "text_lengths"]

"""The networks, in plain PyTorch and timm."""

from coca_lit.models.coca import CoCa, CoCaOutput, text_lengths
from coca_lit.models.presets import PRESETS, create_model

__all__ = ["PRESETS", "CoCa", "CoCaOutput", "create_model", "text_lengths"]

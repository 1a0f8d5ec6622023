"""The networks, in plain PyTorch and timm."""

from coca_lit.models.coca import CoCa, CoCaOutput, text_lengths
from coca_lit.models.generate import Captions
from coca_lit.models.presets import PRESETS, create_model

__all__ = ["PRESETS", "Captions", "CoCa", "CoCaOutput", "create_model", "text_lengths"]

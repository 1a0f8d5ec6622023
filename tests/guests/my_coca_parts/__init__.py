"""A package that extends coca_lit and is no part of it: data, an objective, an image encoder, a callback, a logger."""

from coca_lit.models import create_model
from my_coca_parts.data import PatchesDataModule, patch_records
from my_coca_parts.encoder import my_tiny_vit
from my_coca_parts.training import Brightness, CountSteps, JsonLogger

__all__ = [
    "Brightness",
    "CountSteps",
    "JsonLogger",
    "PatchesDataModule",
    "create_model",
    "my_tiny_vit",
    "patch_records",
]

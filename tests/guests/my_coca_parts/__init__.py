"""A package that extends coca_lit and is no part of it: a part of each kind, in a file each."""

from my_coca_parts.data import PatchesDataModule, patch_records
from my_coca_parts.encoder import PatchMixer
from my_coca_parts.evaluation import CaptionLength, GuessedBrightness
from my_coca_parts.training import Brightness, CountSteps, JsonLogger

__all__ = [
    "Brightness",
    "CaptionLength",
    "CountSteps",
    "GuessedBrightness",
    "JsonLogger",
    "PatchMixer",
    "PatchesDataModule",
    "patch_records",
]

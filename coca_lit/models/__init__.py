"""The networks, in plain PyTorch and timm.

The names below are imported on first use, so that a module which needs no network, such as the options of generation,
does not load PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coca_lit.models.clip import CLIP, DualEncoder
    from coca_lit.models.coca import CoCa, CoCaOutput
    from coca_lit.models.cost import part_sizes
    from coca_lit.models.generation.generate import Captions
    from coca_lit.models.packing import text_lengths
    from coca_lit.models.presets import PRESETS, create_model
    from coca_lit.models.registry import (
        register_image_encoder,
        register_objective,
        register_pooler,
        register_text_tower,
    )

_MODULES = {
    "CLIP": "clip",
    "DualEncoder": "clip",
    "CoCa": "coca",
    "CoCaOutput": "coca",
    "part_sizes": "cost",
    "text_lengths": "packing",
    "Captions": "generation.generate",
    "PRESETS": "presets",
    "create_model": "presets",
    "register_image_encoder": "registry",
    "register_objective": "registry",
    "register_pooler": "registry",
    "register_text_tower": "registry",
}

__all__ = [
    "CLIP",
    "PRESETS",
    "Captions",
    "CoCa",
    "CoCaOutput",
    "DualEncoder",
    "create_model",
    "part_sizes",
    "register_image_encoder",
    "register_objective",
    "register_pooler",
    "register_text_tower",
    "text_lengths",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'coca_lit.models' has no attribute '{name}'")
    return getattr(import_module(f"coca_lit.models.{_MODULES[name]}"), name)

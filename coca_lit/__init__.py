"""Contrastive Captioners (CoCa): one network that retrieves, classifies and captions images.

The names below are the stable Python interface. They are imported on first use, so that `import coca_lit` costs
nothing.
"""

import sys
from importlib import import_module
from os.path import dirname
from typing import TYPE_CHECKING, Any

_ours = any(word.removeprefix("-m").partition(".")[0] == __name__ for word in sys.orig_argv[1:])
if _ours and sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[0] != dirname(dirname(__file__)):
    del sys.path[0]  # `python -m coca_lit.…` puts the current folder first, where a torch.py may lie among photos

if TYPE_CHECKING:
    from coca_lit.data.transforms import build_transform
    from coca_lit.metrics.captions import caption_scores
    from coca_lit.metrics.retrieval import recall_at_k
    from coca_lit.models import CoCa, create_model
    from coca_lit.tokenizer import get_tokenizer
    from coca_lit.weights.hub import list_models
    from coca_lit.weights.load import load_model, save_model
    from coca_lit.weights.open_clip import from_open_clip, to_open_clip

__version__ = "0.2.0"

_HOMES = {
    "CoCa": "coca_lit.models",
    "create_model": "coca_lit.models",
    "list_models": "coca_lit.weights.hub",
    "load_model": "coca_lit.weights.load",
    "save_model": "coca_lit.weights.load",
    "from_open_clip": "coca_lit.weights.open_clip",
    "to_open_clip": "coca_lit.weights.open_clip",
    "get_tokenizer": "coca_lit.tokenizer",
    "build_transform": "coca_lit.data.transforms",
    "caption_scores": "coca_lit.metrics.captions",
    "recall_at_k": "coca_lit.metrics.retrieval",
}

__all__ = [
    "CoCa",
    "build_transform",
    "caption_scores",
    "create_model",
    "from_open_clip",
    "get_tokenizer",
    "list_models",
    "load_model",
    "recall_at_k",
    "save_model",
    "to_open_clip",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'coca_lit' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)

"""A small captioner of OpenCLIP 4, and its weights for the oracle."""

from typing import Any

import torch
from torch import Tensor

from coca_lit.models import CoCa, create_model
from coca_lit.weights.open_clip import from_open_clip, to_open_clip
from coca_lit.weights.open_clip.config import open_clip_config
from helpers import oracle
from helpers.oracle import State

HEADS = {"image": 3, "pooler": 4, "text": 2}
SMALL: dict[str, Any] = {
    "image_encoder_args": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": HEADS["image"]},
    "image_size": 16,
    "embed_dim": 32,
    "pooler_queries": 5,
    "pooler_heads": HEADS["pooler"],
    "context_length": 12,
    "text_width": 32,
    "text_layers": 2,
    "text_heads": HEADS["text"],
    "decoder_layers": 3,
}
TEXTS = ["a dog", "two cats sit on a very long wooden bench! indeed they do", "hat !", ""]


def make(**overrides: Any) -> tuple[CoCa, State, State]:
    """A model, its OpenCLIP file with every tensor random, and that in float64."""
    arguments = {"pooler": "openclip_cascade", **SMALL, **overrides}
    blank = create_model("coca_ViT-B-32", **arguments)
    state = oracle.random_state({name: tuple(tensor.shape) for name, tensor in to_open_clip(blank).items()})
    state["text.token_embedding.weight"] *= 3
    model = from_open_clip(state, open_clip_config(blank, "4")).eval()
    return model, state, {name: t.double() for name, t in state.items()}


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs, atol=5e-5, rtol=0)

"""The captions of OpenCLIP 3.3.0, id for id, as its own `generate` wrote them (see `helpers/beam_oracle.py`)."""

import functools
import json
from typing import Any

import pytest
import torch

from coca_lit.models import CoCa
from coca_lit.weights.open_clip import from_open_clip
from helpers.beam_oracle import CASES, RECORDED, SEED, tiny_images, tiny_open_clip
from helpers.slow import slow

EXPECTED: dict[str, list[list[int]]] = json.loads(RECORDED.read_text())


@functools.cache
def converted(end_logit: float) -> CoCa:
    heads = {"patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 1}
    return from_open_clip(tiny_open_clip(end_logit).state_dict(), image_encoder_args=heads, text_heads=4)


def our_options(theirs: dict[str, Any]) -> dict[str, Any]:
    """OpenCLIP's arguments in our words; defaults are the same, except that our greedy has no least length."""
    options = {"max_length": theirs.get("seq_len", 30), "repetition_penalty": theirs.get("repetition_penalty", 1.0)}
    if theirs.get("generation_type") == "top_k":
        return options | {"min_length": 5}
    if theirs.get("generation_type") == "top_p":
        return options | {"preset": "mobileclip2"}
    beams = {"num_beams": theirs["num_beams"]} if "num_beams" in theirs else {}
    least = {"min_length": theirs["min_seq_len"]} if "min_seq_len" in theirs else {}
    return options | beams | least | {"strategy": "beam", "scoring": "openclip_legacy"}


USUAL = ("beams, end 22", "repetition", "greedy, end 20", "Apple, end 20")


@pytest.mark.parametrize("name", [*USUAL, *slow(*(name for name in CASES if name not in USUAL))])
def test_captions_are_those_of_open_clip(name: str) -> None:
    """Sampled ones for the same random numbers."""
    options, model = our_options(CASES[name]["arguments"]), converted(CASES[name]["end_logit"])
    torch.manual_seed(SEED)
    captions = model.generate(tiny_images(), **options)
    expected = [row + [0] * (options["max_length"] - len(row)) for row in EXPECTED[name]]
    assert captions.tolist() == expected

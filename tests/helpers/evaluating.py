"""A model and records to score."""

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from coca_lit.data.records import Record
from coca_lit.models import CoCa, create_model

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def records() -> list[Record]:
    """Seven images with one to three captions each."""
    captions = [tuple(" ".join(WORDS[i:] + WORDS[:j]) for j in range(i % 3 + 1)) for i in range(7)]
    return [Record(f"image {i}", partial(noise, i), captions[i]) for i in range(7)]


def make_model(**overrides: Any) -> CoCa:
    torch.manual_seed(0)
    model = create_model("coca_tiny", tokenizer=WORDS, **overrides)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # so that images and texts differ clearly
    return model.train()

"""Greedy decoding with caches against a loop that runs the whole model for every token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from coca_lit.models import CoCa
from coca_lit.testing import ENCODER
from helpers.slow import slow

WORDS = ["a", "b", "c", "d", "e"]  # few enough for an untrained model to choose the end id now and then
Build = Callable[..., CoCa]


@pytest.fixture
def model(tiny_model: Build) -> CoCa:
    return captioner(tiny_model)


def captioner(tiny_model: Build, **arguments: Any) -> CoCa:
    """A model with weights so large that every token depends on the image and on the tokens before it."""
    model, generator = tiny_model(tokenizer=WORDS, **ENCODER, **arguments), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.startswith("image_encoder"):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def pixels(model: CoCa, count: int) -> Tensor:
    """Images of one random colour each: an untrained encoder tells them apart better than noise."""
    colours = torch.randint(0, 256, (count, 3, 1, 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return colours.expand(-1, -1, model.image_size, model.image_size)


@torch.no_grad()
def naive(model: CoCa, image: Tensor, max_length: int) -> list[int]:
    """Most likely next token, again and again, from the logits of the full model for a text with one more token."""
    tokenizer = model.tokenizer
    ids = [tokenizer.sot_id]
    while ids[-1] != tokenizer.eot_id:
        if len(ids) == max_length - 1:
            return [*ids, tokenizer.eot_id]
        logits = model(image[None], torch.tensor([[*ids, tokenizer.eot_id]])).logits  # (len(ids), V)
        ids.append(int(logits[-1].argmax()))
    return ids + [tokenizer.pad_id] * (max_length - len(ids))


@pytest.mark.parametrize(
    "arguments",
    [
        {"pooler": "cascade", "cls_mask": "legacy"},
        *slow({}, {"pooler": "parallel"}, {"pooler": "openclip_cascade"}),
    ],
)
@pytest.mark.parametrize("max_length", [3, 24])
def test_equals_the_uncached_loop(tiny_model: Build, arguments: dict[str, Any], max_length: int) -> None:
    model = captioner(tiny_model, **arguments)
    images = pixels(model, 5)
    captions = model.generate(images, max_length=max_length)
    assert captions.tolist() == [naive(model, image, max_length) for image in images]


def test_default_length_is_30_or_the_context(tiny_model: Build) -> None:
    for context, expected in [(76, 30), (24, 24)]:
        model = tiny_model(tokenizer=WORDS, context_length=context)
        assert model.generate(pixels(model, 1)).shape == (1, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a b c", "max_length": 6}, None),
        ({"prompt": "a b c", "max_length": 5}, "4 of 5"),
        ({"prompt": "a b c d", "max_length": 7}, None),
        ({"prompt": "a b c d", "max_length": 5}, "5 of 5"),
        ({"prompt": "a " * 30}, "of 24"),  # cut to the context by the tokenizer
    ],
)
def test_a_prompt_leaves_room_for_a_caption(model: CoCa, arguments: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert model.generate(pixels(model, 2), **arguments).shape == (2, arguments["max_length"])
    else:
        with pytest.raises(ValueError, match=message):
            model.generate(pixels(model, 2), **arguments)

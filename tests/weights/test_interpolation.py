"""Weights between two models, by hand and at both ends."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

from coca_lit.models import CoCa
from coca_lit.weights.computation import interpolate


def test_a_quarter_of_the_way(tiny_model: Callable[..., CoCa]) -> None:
    before, after = tiny_model(), tiny_model()
    before.logit_scale.data.fill_(1.0)
    after.logit_scale.data.fill_(3.0)
    norm = next(name for name, _ in after.named_buffers() if name.endswith("running_var"))
    after.get_buffer(norm).fill_(5.0)  # it was 1
    interpolate(after, before, 0.25)
    assert after.logit_scale.item() == 1.5
    assert after.get_buffer(norm).unique().tolist() == [2.0]


def test_a_tied_matrix_is_mixed_once(tiny_model: Callable[..., CoCa]) -> None:
    before, after = tiny_model(tied_embeddings=True), tiny_model(tied_embeddings=True)
    for model, value in ((before, 1.0), (after, 3.0)):
        model.text.token_embedding.weight.data.fill_(value)
    interpolate(after, before, 0.5)
    assert after.text.token_embedding.weight.unique().tolist() == [2.0]
    assert after.decoder is not None
    assert after.decoder.vocabulary.weight is after.text.token_embedding.weight


@pytest.mark.parametrize("weight", [0, 1])
def test_both_ends_are_exact(tiny_model: Callable[..., CoCa], weight: float) -> None:
    before, after = tiny_model(), tiny_model()
    for p in after.parameters():
        p.data.mul_(1.1)
    ends = (before.state_dict(), deepcopy(after.state_dict()))
    interpolate(after, before, weight)
    torch.testing.assert_close(after.state_dict(), ends[weight], atol=0, rtol=0)  # type: ignore[index]


@pytest.mark.parametrize(
    ("weight", "other", "message"),
    [
        (1.5, {}, "weight.*1.5"),
        (0.5, {"text_layers": 3}, "'text.blocks.2.norm_1.weight'"),
        (0.5, {"decoder_layers": 0}, "'decoder"),
        (0.5, {"cls_mask": "legacy"}, "text.cls_mask is 'correct' in the model and 'legacy' in the file"),
        (0.5, {"text_heads": 4}, "text.blocks.0.attention.heads is 3 in the model and 4 in the file"),
        (0.5, {"tied_embeddings": True}, "tied_embeddings is False and True"),
    ],
)
def test_what_cannot_be_interpolated(
    tiny_model: Callable[..., CoCa], weight: float, other: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        interpolate(tiny_model(), tiny_model(**other), weight)

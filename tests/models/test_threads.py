"""On several threads the same step gives the same bits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from coca_lit.losses import loss_terms
from coca_lit.models import PRESETS, CoCa, create_model
from coca_lit.models.text import ClsMask

pytestmark = pytest.mark.slow  # each case takes its step three times, on two threads

SMALL = {
    **{"image_size": 32, "embed_dim": 48, "pooler_heads": 4, "pooler_queries": 8, "text_width": 96, "text_heads": 4},
    **{"text_layers": 1, "decoder_layers": 1, "tokenizer": "scenes"},
}
VIT = {"patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 2}
BATCH, LENGTH = 64, 20  # enough for PyTorch to share the work among threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def build(preset: str = "coca_tiny", **arguments: Any) -> CoCa:
    torch.manual_seed(0)
    config = PRESETS[preset] | SMALL | ({"decoder_layers": 0} if preset.startswith("clip") else {}) | arguments
    if config["image_encoder"].startswith("vit_"):
        config["image_encoder_args"] = VIT
    return create_model(preset, **config).train()


def gradients(model: CoCa, full: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8)
    lengths = torch.full((BATCH,), LENGTH) if full else torch.randint(3, LENGTH, (BATCH,), generator=generator)
    tokens = torch.randint(4, 40, (BATCH, LENGTH), generator=generator)
    tokens[torch.arange(LENGTH) >= lengths[:, None]] = 0
    model.zero_grad()
    sum(loss_terms(model(images, tokens, lengths)).values()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_repeats(model: CoCa, full: bool = False) -> None:
    names = [name for name, _ in model.named_parameters()]
    first = gradients(model, full)
    for _ in range(2):
        different = [n for n, a, b in zip(names, first, gradients(model, full), strict=True) if not torch.equal(a, b)]
        assert not different


def test_four_threads() -> None:
    torch.set_num_threads(4)
    assert_repeats(build())


@pytest.mark.parametrize("preset", ["coca_efficientnet", "clip_vit_b32"])
def test_presets(preset: str) -> None:
    assert_repeats(build(preset))


@pytest.mark.parametrize(
    ("pooler", "cls_mask", "full"),
    [
        ("cascade", "correct", False),
        ("parallel", "correct", False),
        ("mean", "correct", False),
        ("single", "legacy", True),
    ],
)
def test_poolers_masks_and_packing(pooler: str, cls_mask: ClsMask, full: bool) -> None:
    assert_repeats(build(pooler=pooler, cls_mask=cls_mask), full)


@pytest.mark.parametrize("contrastive", ["softmax", "siglip"])
def test_tied_embeddings_and_both_losses(contrastive: str) -> None:
    assert_repeats(build(tied_embeddings=True, contrastive=contrastive))


def test_recomputed_blocks() -> None:
    model = build()
    model.set_grad_checkpointing("blocks")
    assert_repeats(model)

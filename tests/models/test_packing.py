"""Packed rows give what the padded grid gives: the same features, hidden states, losses and gradients."""

import shutil

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.testing import assert_close

from coca_lit.losses import caption_loss, contrastive_loss
from coca_lit.models import CoCa, CoCaOutput, create_model
from coca_lit.models.coca import CAPTION, CONTRASTIVE
from coca_lit.models.layers import SelfBlock
from coca_lit.models.packing import Layout
from helpers.fuzzing import fuzz


def test_layout_by_hand() -> None:
    layout = Layout(torch.tensor([2, 3, 1]), packed=True)
    grid = torch.tensor([[1, 2, 0], [3, 4, 5], [6, 0, 0]])
    assert layout.pack(grid).tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(layout.unpack(layout.pack(grid)), grid)
    assert layout.compact(layout.pack(grid), grid % 2 == 0).tolist() == [2, 4, 6]
    assert layout.gather_at(layout.pack(grid), torch.tensor([1, 2, 0])).tolist() == [2, 5, 6]
    assert Layout(torch.tensor([2, 3, 1]), packed=False).gather_at(grid, torch.tensor([1, 2, 0])).tolist() == [2, 5, 6]


def test_packs_where_more_than_a_tenth_is_padding() -> None:
    assert Layout(torch.tensor([10, 7])).packed
    assert not Layout(torch.tensor([10, 9])).packed
    assert not Layout(torch.tensor([4, 4])).packed


def losses(out: CoCaOutput) -> torch.Tensor:
    terms = (
        [contrastive_loss(out.image_features, out.text_features, out.logit_scale)]
        if out.image_features is not None
        else []
    )
    terms += [caption_loss(out.hidden, out.vocabulary, out.labels)] if out.hidden is not None else []
    return torch.stack(terms).sum()


def make_batch(caption_lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, tokens and lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(caption_lengths)
    tokens = torch.randint(4, 40, (len(lengths), int(lengths.max())), generator=generator)
    tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] = 0
    return torch.randint(0, 256, (len(lengths), 3, 32, 32), generator=generator, dtype=torch.uint8), tokens, lengths


def step(
    model: CoCa, batch: tuple, monkeypatch: pytest.MonkeyPatch, threshold: float, **parts: bool
) -> list[torch.Tensor]:
    """Everything that a training step computes, with packing forced (threshold below 0) or forbidden (1)."""
    monkeypatch.setattr("coca_lit.models.packing.WORTHWHILE_PADDING", threshold)
    model.zero_grad()
    images, *texts = batch
    out = model.captions_of(None, *texts) if images is None else model(images, *texts, **parts)
    loss = losses(out)
    loss.backward()
    tensors = [
        loss,
        out.image_features,
        out.text_features,
        out.hidden,
        out.labels,
        *(p.grad for p in model.parameters()),
    ]
    return [tensor for tensor in tensors if tensor is not None]


PARTS = ({}, {"needs": CAPTION}, {"needs": CONTRASTIVE})


@fuzz
@given(lengths=st.lists(st.integers(1, 24), min_size=2, max_size=4), mask=st.sampled_from(["correct", "legacy"]))
@example(lengths=[3, 24], mask="correct")  # one fills the context
@example(lengths=[1, 1], mask="legacy")  # none has a word
def test_packed_equals_padded(lengths: list[int], mask: str) -> None:
    batch = make_batch(lengths)
    torch.manual_seed(0)
    model = create_model("coca_tiny", cls_mask=mask, text_layers=1, decoder_layers=1).double().train()
    with pytest.MonkeyPatch.context() as patch:
        for parts in PARTS:
            padded = step(model, batch, patch, 1.0, **parts)
            packed = step(model, batch, patch, -1.0, **parts)
            assert_close(packed, padded, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_and_stop_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that were not seen before compile nothing."""
    torch.manual_seed(0)
    small = {"text_layers": 1, "decoder_layers": 1, "image_encoder": "vit_base_patch32_clip_224"}
    vit = {"image_encoder_args": {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}}
    plain = create_model("coca_tiny", **small, **vit).train()
    model = create_model("coca_tiny", **small, **vit).train()
    model.load_state_dict(plain.state_dict())
    model.compile_blocks("eager")
    graphs = []
    for lengths in ([3, 9, 4], [5, 5, 5], [12, 3, 8], [2, 7, 20], [6, 6, 6], [11, 4, 4]):
        batch = make_batch(lengths)
        assert_close(step(model, batch, monkeypatch, 0.1), step(plain, batch, monkeypatch, 0.1), rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[2:] == [graphs[2]] * 4


@pytest.mark.slow
def test_masks_texts_and_validation_are_compiled_without_breaks_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of every kind of batch are there after the seventh."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    small = {"text_layers": 2, "decoder_layers": 2, "image_encoder": "vit_base_patch32_clip_224", "cls_mask": "legacy"}
    vit = {"image_encoder_args": {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}}
    model = create_model("coca_tiny", **small, **vit)
    model.compile_blocks("eager")
    graphs = []
    packed = [[3, 9, 4], [12, 3, 8], [2, 7, 20], [11, 4, 4]]
    padded = [[5, 5, 5], [6, 6, 6], [8, 8, 8], [10, 10, 10]]
    for lengths in (lengths for pair in zip(packed, padded, strict=True) for lengths in pair):
        images, *texts = make_batch(lengths)
        step(model.train(), (images, *texts), monkeypatch, 0.1)
        step(model, (None, *texts), monkeypatch, 0.1)
        with torch.no_grad():
            losses(model.eval()(images, *texts))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[6:] == [graphs[6]] * 2
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of the CPU needs g++")
@pytest.mark.slow
def test_block_compiled_for_the_cpu_gives_the_same() -> None:
    torch.manual_seed(0)
    layout = Layout(torch.tensor([2, 5]))
    plain, compiled = SelfBlock(16, 2), SelfBlock(16, 2)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile()
    x = torch.randn(7, 16)
    for block in (plain, compiled):
        block(x, layout=layout).square().sum().backward()
    assert_close(compiled(x, layout=layout), plain(x, layout=layout), rtol=1e-4, atol=1e-5)
    assert_close([p.grad for p in compiled.parameters()], [p.grad for p in plain.parameters()], rtol=1e-4, atol=1e-4)

"""Attention text by text gives what attention on a grid gives, and every parameter its gradient."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from coca_lit.models import create_model
from coca_lit.models.kernels import disabled, fast_attention
from coca_lit.models.layers import CrossBlock, SelfBlock, normalize_once
from coca_lit.models.packing import Layout
from coca_lit.models.text import legacy_attention_mask

LENGTHS = [[5, 9, 2], [1, 3], [0, 4, 1], [12]]


def gradients(module: nn.Module, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Of a weighted sum of the output, by the inputs and all parameters."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    leaves = [*inputs, *module.parameters()]
    found = torch.autograd.grad((out * weights).sum(), leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def relative(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference of two tensors, relative to the norm of the second or to 1 if that is smaller."""
    return max(((x - y).norm() / y.norm().clamp(min=1)).item() for x, y in zip(a, b, strict=True))


def rows(layout: Layout, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(layout.cpu_lengths or []), width, generator=generator, dtype=dtype).requires_grad_()


def randomised(block: SelfBlock | CrossBlock) -> SelfBlock | CrossBlock:
    """With biases and norms that are not 0 and 1."""
    torch.manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("legacy", [False, True])
def test_self_attention_is_that_of_the_grid(lengths: list[int], legacy: bool) -> None:
    block = randomised(SelfBlock(32, 4)).double()
    layout = Layout(torch.tensor(lengths), packed=True)
    mask = None
    if legacy:
        is_cls = layout.positions == torch.tensor(lengths)[:, None] - 1
        mask = legacy_attention_mask(is_cls, torch.tensor([n == 1 for n in lengths]))
    x = rows(layout, 32, torch.float64)
    by_text = block(x, mask, None, layout)
    padded = torch.where(layout.mask[..., None], layout.unpack(x), 1.0)  # what padding holds must not matter
    # A padded row of the grid may have nothing to look at, so all see themselves there.
    grid_mask = None if mask is None else mask | torch.diag_embed(~layout.mask)[:, None]
    on_grid = layout.pack(block(padded, grid_mask))
    assert_close(by_text, on_grid, rtol=1e-10, atol=1e-10)
    assert relative(gradients(block, by_text, x), gradients(block, on_grid, x)) < 1e-12


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_cross_attention_needs_no_keys_and_values(lengths: list[int], dtype: torch.dtype, tolerance: float) -> None:
    block = randomised(CrossBlock(64, 48, 4)).to(dtype)
    layout = Layout(torch.tensor(lengths), packed=True)
    image = torch.randn(len(lengths), 7, 48, dtype=dtype).requires_grad_()
    x, normed = rows(layout, 64, dtype), normalize_once(image)
    fast = block(x, normed, layout)
    with disabled():
        plain = block(x, normed, layout)
    assert relative([fast], [plain]) < tolerance
    assert relative(gradients(block, fast, x, image), gradients(block, plain, x, image)) < tolerance


def test_the_bias_of_the_keys_gets_a_gradient_and_it_is_zero() -> None:
    """Softmax does not see it. Without any gradient, training on several processes would wait for it."""
    block = randomised(CrossBlock(64, 48, 4))
    layout = Layout(torch.tensor([3, 5]), packed=True)
    block(rows(layout, 64), normalize_once(torch.randn(2, 7, 48)), layout).square().sum().backward()
    by_keys, by_values = block.attention.kv.bias.grad.chunk(2)
    assert by_keys.abs().max() == 0
    assert by_values.abs().min() > 0


@pytest.mark.parametrize(("lengths", "absorbs"), [([15, 15], True), ([31, 2], False), ([16, 16], False)])
def test_texts_as_long_as_a_head_is_wide_get_keys_and_values(
    lengths: list[int], absorbs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(fast_attention, "attend_without_kv", lambda q, *_: calls.append(1) or q)
    block, layout = CrossBlock(64, 48, 4), Layout(torch.tensor(lengths), packed=True)
    block(rows(layout, 64), torch.randn(2, 7, 48), layout)
    assert bool(calls) == absorbs


def step(bf16: bool = False, packed: bool = True) -> list[Tensor]:
    """Caption states of a small model, and the gradients of all parameters, dropout 0."""
    torch.manual_seed(0)
    model = create_model("coca_tiny").train()
    lengths = torch.tensor([5, 20, 2, 9])
    tokens = torch.randint(4, 40, (4, 20), generator=torch.Generator().manual_seed(1))
    tokens[torch.arange(20) >= lengths[:, None]] = 0
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        patch.setattr("coca_lit.models.packing.WORTHWHILE_PADDING", 0.1 if packed else 1.0)
        out = model(images, tokens, lengths)
    everything = torch.cat([out.hidden, out.text_features])
    return [everything, *gradients(model, everything)]


def test_in_bf16_it_is_as_exact_as_the_grid() -> None:
    exact = step()
    on_grid, by_text = (relative(step(bf16=True, packed=packed), exact) for packed in (False, True))
    assert by_text < 2 * on_grid

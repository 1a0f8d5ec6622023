"""The text side's linear layer gives fp32 results, and never another kind of number than PyTorch's own layer."""

import pytest
import torch

from coca_lit.models.linear import Linear


@pytest.mark.parametrize("rows", [(1,), (2, 3), (8,), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_without_gradients_it_is_exact_to_fp32(rows: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = Linear(64, 96, bias=bias), torch.randn(*rows, 64)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        torch.testing.assert_close(layer(x).double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 3), (8,), (200,), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_bf16_is_rounded_once(rows: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = Linear(64, 96, bias=bias).bfloat16(), torch.randn(*rows, 64).bfloat16()
    with torch.no_grad():
        expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        found = layer(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)


def test_it_learns_casts_and_goes_to_half_precision_like_any_layer() -> None:
    layer, x = Linear(64, 96), torch.randn(8, 64)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16

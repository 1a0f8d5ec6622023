"""Linear layers give the results of PyTorch's own in every way that they multiply."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.models import create_model
from coca_lit.models.kernels import cpu_linear
from coca_lit.models.kernels.cpu_linear import Linear, packed_weights

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies no bf16 on this processor"
)


def exact(layer: Linear, x: Tensor) -> Tensor:
    return F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize(
    ("intel", "rows", "width", "left", "onednn"),
    [
        (False, (0, 5), 64, False, False),
        (False, (1,), 64, True, False),
        (False, (2, 2), 64, True, False),
        (False, (1,), 2048, False, True),
        (False, (4,), 2048, False, True),
        (False, (5,), 64, True, True),
        (False, (2, 8), 2048, True, True),
        (False, (17,), 64, False, True),
        (True, (1,), 64, False, False),
        (True, (3,), 2048, False, False),
        (True, (4,), 64, True, True),
        (True, (4,), 2048, True, True),
        (True, (17,), 64, False, True),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_in_fp32_processor_rows_and_width_choose_the_way(
    monkeypatch: pytest.MonkeyPatch,
    intel: bool,
    rows: tuple[int, ...],
    width: int,
    left: bool,
    onednn: bool,
    bias: bool,
) -> None:
    monkeypatch.setattr(cpu_linear, "INTEL_ROWS", 3 if intel else 0)
    torch.manual_seed(0)
    layer, x = Linear(width, 96, bias=bias), torch.randn(*rows, width)
    with (
        torch.no_grad(),
        mock.patch.object(cpu_linear, "_weights_left", wraps=cpu_linear._weights_left) as weights_left,
        mock.patch.object(cpu_linear, "_onednn", wraps=cpu_linear._onednn) as by_onednn,
    ):
        found = layer(x)
    assert (weights_left.called, by_onednn.called) == (left, onednn)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), exact(layer, x), atol=4e-6, rtol=0)


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 3), (8,), (200,), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [pytest.param(True, marks=needs_bf16), False])
def test_bf16_is_rounded_once(rows: tuple[int, ...], bias: bool, packed: bool) -> None:
    torch.manual_seed(0)
    layer, x = Linear(64, 96, bias=bias).bfloat16(), torch.randn(*rows, 64).bfloat16()
    with torch.no_grad(), packed_weights(*[layer] * packed):
        assert (layer.packed is not None) == packed
        found = layer(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), exact(layer, x), rtol=2**-8, atol=1e-5)


def test_it_learns_casts_and_goes_to_half_precision_like_any_layer() -> None:
    layer, x = Linear(64, 96), torch.randn(8, 64)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@needs_bf16
def test_only_bf16_is_packed_and_only_while_captions_are_written() -> None:
    model = create_model("coca_tiny")
    images, vocabulary, seen = torch.zeros(1, 3, 224, 224), model.decoder.vocabulary, []
    vocabulary.register_forward_hook(lambda *_: seen.append(vocabulary.packed is not None))
    model.generate(images, max_length=5)
    model.bfloat16().generate(images, max_length=5)
    assert seen == [False] * (len(seen) // 2) + [True] * (len(seen) // 2)
    with packed_weights(model):
        before = vocabulary.packed
        model.generate(images, max_length=5)
        assert before is not None
        assert vocabulary.packed is before
    with pytest.raises(KeyError), packed_weights(model):
        raise KeyError
    assert all(layer.packed is None for layer in model.modules() if isinstance(layer, Linear))

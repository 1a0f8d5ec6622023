"""liger-kernel's loss in Triton's interpreter, which runs the real kernels on the CPU, against the plain formula."""

import importlib.util
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.losses import caption, caption_loss

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None,
    reason="the fused kernel needs pip install 'coca_lit[kernels]'",
)
LABELS = {
    "all": torch.tensor([3, 11, 0, 49, 7]),
    "some ignored": torch.tensor([3, -100, 0, -100, 7]),
    "none left": torch.full((5,), -100),
}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton interprets for processes that have not compiled for a GPU; coca-gpu-check compares there")
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":  # it is read at that import
        pytest.skip("Triton is imported already: TRITON_INTERPRET=1 pytest -n 0 tests/losses/test_fused_kernel.py")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(caption, "_has_fused_kernel", lambda hidden: True)


def loss_and_gradients(fused: bool, labels: Tensor, smoothing: float, half: bool) -> list[Tensor]:
    """With the loss in the middle of a graph, as in training: its gradient is not 1."""
    torch.manual_seed(0)
    hidden, vocabulary = torch.randn(5, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        if fused:
            loss = caption_loss(hidden, vocabulary, labels, smoothing=smoothing)
        else:
            logits = F.linear(hidden, vocabulary).float()
            total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
            loss = total / (labels != -100).sum().clamp(min=1)
    (2 * loss).backward()
    assert hidden.grad is not None
    assert vocabulary.grad is not None
    return [loss.detach().float(), hidden.grad, vocabulary.grad]


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", LABELS)
def test_the_kernel_equals_the_formula(labels: str, smoothing: float, half: bool) -> None:
    found = loss_and_gradients(True, LABELS[labels], smoothing, half)
    expected = loss_and_gradients(False, LABELS[labels], smoothing, half)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        if half:  # the kernel rounds logits and their gradient to bf16
            torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    if labels == "none left":
        assert not any(x.any() for x in found)

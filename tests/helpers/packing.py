"""Training with packed texts against padded ones, for every text side."""

import pytest
import torch

from coca_lit.losses import loss_terms
from coca_lit.models import CoCa


def check_packed_training(model: CoCa, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features, hidden states and gradients are equal with and without padding, whatever is computed again."""
    lengths = torch.tensor([5, 24, 2, 9])
    tokens = torch.randint(4, 40, (4, 24)).masked_fill(torch.arange(24) >= lengths[:, None], 0)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    found = []
    for threshold in (1.0, -1.0):
        monkeypatch.setattr("coca_lit.models.packing.WORTHWHILE_PADDING", threshold)
        for recompute in ("none", "blocks", "cross_attention"):
            model.set_grad_checkpointing(recompute)
            model.zero_grad()
            out = model(pixels, tokens, lengths)
            sum(loss_terms(out).values()).backward()
            assert all(p.grad is not None for p in model.parameters())
            found.append([out.text_features, out.hidden, *(p.grad.clone() for p in model.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-9)

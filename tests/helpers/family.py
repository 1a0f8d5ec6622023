"""What holds for every member of the family: files, packed training, cached generation."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from coca_lit.losses import loss_terms
from coca_lit.models import CoCa
from coca_lit.models.generation.generate import Captions
from coca_lit.tools.export.open_clip import write_open_clip
from coca_lit.weights.load import load_model, save_model


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


def check_files(model: CoCa, folder: Path, version: str = "4") -> None:
    """OpenCLIP's file and ours give the model back, and OpenCLIP 3 has no such model."""
    write_open_clip(model, folder, version=version)
    loaded = load_model(folder / "open_clip_model.safetensors")
    assert loaded.config == model.config
    assert loaded.preprocessing == model.preprocessing
    save_model(model, folder / "ours.safetensors")
    assert load_model(folder / "ours.safetensors").config == model.config
    with pytest.raises(ValueError, match=r"OpenCLIP 4|version=(4|mammut)"):
        write_open_clip(model, folder)


def check_cached_generation(model: CoCa, pixels: Tensor) -> Captions:
    """The log-probabilities of beams are those of the whole pass; returns the beams."""
    beams = model.generate(pixels, strategy="beam", num_beams=3, num_captions=3, prompt="a red", return_scores=True)
    for i in range(len(pixels)):
        lengths = (beams.ids[i] == model.tokenizer.eot_id).int().argmax(-1) + 1
        prefix = model.log_likelihood(pixels[i : i + 1], beams.ids[i, :1, :3], torch.tensor([3]))
        expected = model.log_likelihood(pixels[i : i + 1], beams.ids[i], lengths) - prefix
        torch.testing.assert_close(beams.log_probs[i] * (lengths - 3), expected, atol=1e-4, rtol=1e-4)
    return beams

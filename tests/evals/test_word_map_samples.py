"""Pictures of where words come from, whichever function says it, and without one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from coca_lit import extensions
from coca_lit.data.scenes.render import render, scene_records
from coca_lit.evals import Settings
from coca_lit.evals.captions import CaptionScores
from coca_lit.evals.word_maps import overlay, word_map_samples
from coca_lit.models import CoCa
from coca_lit.models.inputs import Images
from coca_lit.tools.demo.answers import write_captions
from helpers.running import without_java


def corners(model: CoCa, pixels: Images, ids: Tensor, attention: Tensor) -> list[tuple[list[str], Tensor]]:
    """Every word comes from the upper right corner."""
    assert attention.shape[:2] == ids.shape
    maps = torch.zeros(4, 4)
    maps[0, 3] = 1
    captions = [model.tokenizer.decode(row).split() for row in ids]
    return [(words, maps.expand(len(words), -1, -1)) for words in captions]


def test_overlay_is_bright_where_it_looked() -> None:
    attention = torch.zeros(4, 4)
    attention[0, 3] = 1
    drawn = np.asarray(overlay(Image.new("RGB", (32, 32), (90, 90, 90)), attention).convert("L"), dtype=float)
    quarter = len(drawn) // 4
    corner = drawn[:quarter, -quarter:].mean()
    assert corner > drawn[-quarter:, :quarter].mean() + 50


def test_captions_that_are_drawn_are_the_same_each_time(tiny_model) -> None:
    model, records = tiny_model(), scene_records("val", count=2)
    first, again = (word_map_samples(model, records, 2, {"strategy": "sample"}, corners) for _ in range(2))
    assert [sample["caption"] for sample in first] == [sample["caption"] for sample in again]
    for sample in first:
        assert [part["word"] for part in sample["words"]] == sample["caption"].split()


def test_without_a_project_nothing_is_shown(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_java(monkeypatch)
    monkeypatch.setattr(extensions, "declared", lambda kind: {})
    evaluation = CaptionScores("mine", scene_records("val", count=2))
    evaluation.evaluate(tiny_model(), Settings(tmp_path, attention=1))
    assert "no installed project" in evaluation.not_run["mine attention"]
    assert not (tmp_path / "samples" / "mine_attention.json").exists()
    assert {candidate.words for candidate in write_captions(tiny_model(), render(7, 64), "beam", 2)} == {()}

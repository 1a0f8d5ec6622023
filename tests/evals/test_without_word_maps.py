"""Without a project that says where words come from."""

from pathlib import Path

import pytest

from coca_lit import extensions
from coca_lit.data.scenes.render import render, scene_records
from coca_lit.evals import Settings
from coca_lit.evals.captions import CaptionScores
from coca_lit.tools.demo.answers import write_captions
from helpers.running import without_java


def test_without_a_project_nothing_is_shown(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_java(monkeypatch)
    monkeypatch.setattr(extensions, "declared", lambda kind: {})
    evaluation = CaptionScores("mine", scene_records("val", count=2))
    evaluation.evaluate(tiny_model(), Settings(tmp_path, attention=1))
    assert "no installed project" in evaluation.not_run["mine attention"]
    assert not (tmp_path / "samples" / "mine_attention.json").exists()
    assert {candidate.words for candidate in write_captions(tiny_model(), render(7, 64), "beam", 2)} == {()}

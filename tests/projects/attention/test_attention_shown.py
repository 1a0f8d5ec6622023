"""Reports and the demo show where the decoder looked."""

import json
from pathlib import Path

import pytest

from coca_lit.data.scenes.render import render, scene_records
from coca_lit.evals import Settings
from coca_lit.evals.captions import CaptionScores
from coca_lit.tools.demo.answers import write_captions
from helpers.running import without_java


def test_every_word_has_a_picture_of_where_the_decoder_looked(tiny_model) -> None:
    for candidate in write_captions(tiny_model(), render(7, 64), "beam", 3):
        assert candidate.words
        assert " ".join(word for word, _ in candidate.words) == candidate.caption
        assert all(picture.startswith("data:image/png;base64,") for _, picture in candidate.words)


def test_samples_for_the_report(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_java(monkeypatch)
    options = {"strategy": "beam", "num_beams": 2, "max_length": 8}
    evaluation = CaptionScores("mine", scene_records("val", count=5))
    evaluation.evaluate(tiny_model(), Settings(tmp_path, attention=2, generate=options))
    captions = [row["caption"] for row in json.loads((tmp_path / "predictions" / "mine.json").read_text())]
    first, _ = json.loads((tmp_path / "samples" / "mine_attention.json").read_text())
    assert [part["word"] for part in first["words"]] == captions[0].split()

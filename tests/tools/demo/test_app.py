"""The file for a Space, as it is copied there, and parts of the page that need no browser."""

import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coca_lit.models import create_model
from coca_lit.tools.demo.answers import Candidate, rank
from coca_lit.weights.load import save_model

APP = Path(__file__).resolve().parents[3] / "coca_lit" / "tools" / "demo" / "app.py"


def test_the_page_is_launched_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gr = pytest.importorskip("gradio")
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: shown.append(options))
    save_model(create_model("coca_tiny"), tmp_path / "tiny.safetensors")
    monkeypatch.setenv("MODEL", str(tmp_path / "tiny.safetensors"))
    runpy.run_path(str(APP))
    (options,) = shown
    assert "server_name" not in options  # the Space's own
    assert options["css"]


def test_maps_of_words_are_shown_where_there_are_any() -> None:
    pytest.importorskip("gradio")
    from coca_lit.tools.demo.page import _caption_table

    plain = Candidate("a <dog>", -0.5, 0.3)
    assert 'class="maps"' not in _caption_table([plain], 0.2, 100.0)
    shown = _caption_table([replace(plain, words=(("<dog>", "data:image/png;base64,AAAA"),))], 0.2, 100.0)
    assert '<div class="maps"><figure><img src="data:image/png;base64,AAAA"' in shown
    assert "<figcaption>&lt;dog&gt;</figcaption>" in shown


def test_captions_are_in_the_order_of_the_last_column() -> None:
    """Though the second one fits the photo more: by hand, of 0.2 · 100 · cosine + 0.8 · log-probability."""
    pytest.importorskip("gradio")
    from coca_lit.tools.demo.page import _caption_table

    first, second = Candidate("a dog", -0.5, 0.30), Candidate("a cat", -0.9, 0.31)
    assert rank([second, first], 0.2, 100.0) == [first, second]
    shown = re.findall(r">(\d+)%</td>", _caption_table([first, second], 0.2, 100.0))
    assert shown == ["27", "53", "73", "47"]

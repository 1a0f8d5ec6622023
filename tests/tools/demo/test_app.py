"""The file for a Space, as it is copied there."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from coca_lit.models import create_model
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

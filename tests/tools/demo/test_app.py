"""The file for a Space, as it is copied there, and parts of the page that need no browser."""

import re
import runpy
from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coca_lit.models import create_model
from coca_lit.tools.checkpoint import write_scenes
from coca_lit.tools.demo.answers import Candidate, rank
from coca_lit.tools.search.index import ImageIndex
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


def test_html_of_others_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gradio renders HTML, Markdown and messages; labels and the names below images it shows as they are."""
    gr = pytest.importorskip("gradio")
    from coca_lit.tools.demo import page

    hostile = "<img src=x onerror=alert(1)><script>alert(2)<b>${alert(3)}{{this}}"
    shown = escape(hostile, quote=False)
    model = create_model("coca_tiny").eval()
    (scene,) = write_scenes(tmp_path / "scenes", count=1).glob("*.png")
    photo = scene.rename(scene.with_name(f"{hostile}.png"))
    index = ImageIndex(model, photo.parent)
    index.update()
    said: list[str] = []
    monkeypatch.setattr(gr, "Warning", lambda message, **_: said.append(message))
    monkeypatch.setattr(page, "write_captions", lambda *_, **__: [Candidate(hostile, -0.5, 0.3, ((hostile, ""),))])
    blocks = page.build_page(model, hostile, index)
    functions = {block.fn.__name__: block.fn for block in blocks.fns.values() if block.fn is not None}

    _, _, table = functions["on_write"](photo, "beam", 1, 0.5, 0)
    functions["on_classify"](photo, "circle", hostile)
    photo.unlink()
    functions["on_text"]("a red star", False)
    functions["on_upload"]({"path": str(photo)})
    with pytest.raises(gr.Error) as gone:
        functions["on_select"](SimpleNamespace(index=0))
    (banner,) = [block.value for block in blocks.blocks.values() if block.elem_id == "banner"]
    assert f"the template '{shown}' has no" in said[0]
    assert said[2].startswith(f"{shown}.png is refused")
    assert gone.value.message.startswith(f"{shown}.png is refused")
    for rendered in (table, banner):
        assert shown in rendered
    for rendered in (
        table,
        banner,
        gone.value.message,
        *said,
        *(b.value for b in blocks.blocks.values() if is_html(b)),
    ):
        assert hostile not in rendered
        assert "<script" not in rendered
        assert "<img src=x" not in rendered


def is_html(block: Any) -> bool:
    return type(block).__name__ in ("HTML", "Markdown")


def test_captions_are_in_the_order_of_the_last_column() -> None:
    """Though the second one fits the photo more: by hand, of 0.2 · 100 · cosine + 0.8 · log-probability."""
    pytest.importorskip("gradio")
    from coca_lit.tools.demo.page import _caption_table

    first, second = Candidate("a dog", -0.5, 0.30), Candidate("a cat", -0.9, 0.31)
    assert rank([second, first], 0.2, 100.0) == [first, second]
    shown = re.findall(r">(\d+)%</td>", _caption_table([first, second], 0.2, 100.0))
    assert shown == ["27", "53", "73", "47"]

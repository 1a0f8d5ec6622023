"""The report of a stranger's run folder: one sentence for what no run writes, nothing from outside it, nothing that
controls a terminal.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coca_lit.tools.report.command import report

pytestmark = pytest.mark.slow

RUN = {"x/CIDEr": 0.5}
SAMPLE = {"image": "data:image/png;base64,", "caption": "a", "exact": True, "references": ["a"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "results.json").write_text(json.dumps(RUN))
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    return tmp_path / "run"


def refused(folder: Path, name: str) -> str:
    """What the command says; it names the file, on one line."""
    with pytest.raises(SystemExit) as error:
        report([str(folder)])
    message = str(error.value)
    assert message.startswith("error: ")
    assert name in message
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_an_output_that_cannot_be_made(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(SystemExit, match=r"^error: cannot write .*file/report\.md: "):
        report([str(folder), str(folder), "--output", str(folder / "file")])


def test_references_call_no_resolver_and_may_form_a_circle(folder: Path) -> None:
    (folder / "config.yaml").write_text('a: "${b}"\nb: "x${a}"\nseed: ${oc.env:HOME}\n')
    report([str(folder)])
    report([str(folder), str(folder), "--output", str(folder / "both")])
    assert "<span>seed</span> ${oc.env:HOME}" in (folder / "report.html").read_text()


FILES: list[tuple[str, Any]] = [
    ("results.json", [1]),
    ("results.json", {"x/CIDEr": "high"}),
    ("results.json", {"x/CIDEr": True}),
    ("results.json", {"x/CIDEr": int("9" * 400)}),
    ("not_run.json", {"SPICE": ["no jars"]}),
    ("not_run.json", ["SPICE"]),
    ("environment.json", {"parameters": 7}),
    ("environment.json", {"parameters": {"image encoder": "many"}}),
    ("environment.json", {"seconds": "60"}),
    ("environment.json", {"command": {}}),
    ("environment.json", {"seconds": int("9" * 400)}),
    ("samples/a_captions.json", {"image": "a"}),
    ("samples/a_captions.json", [SAMPLE | {"image": 7}]),
    ("samples/a_captions.json", [SAMPLE | {"references": "a"}]),
    ("samples/a_captions.json", [SAMPLE | {"question": 7}]),
    ("samples/a_worst.json", [{}]),
    ("samples/a_retrieval.json", {"text_to_image": []}),
    ("samples/a_retrieval.json", {"text_to_image": [{"text": "a", "answers": [7]}], "image_to_text": []}),
    ("samples/a_attention.json", [{"image": "data:image/png;", "words": None}]),
    ("samples/a_confusion.json", [{"image": None, "class": "a", "taken_for": "b", "images": 1, "of": 2}]),
]


@pytest.mark.parametrize(("name", "content"), FILES)
def test_values_of_other_types(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))
    refused(folder, name)


@pytest.mark.parametrize("row", [b"1,much", b"1e5,2.0", b"1,2.0,3.0"])
def test_curves_of_other_values(folder: Path, row: bytes) -> None:
    (folder / "metrics.csv").write_bytes(b"step,x_loss\n" + row + b"\n")
    refused(folder, "metrics.csv")


PLACES = ["config.yaml", "environment.json", "not_run.json", "metrics.csv", "samples/a_captions.json", "samples/a.png"]


@pytest.mark.parametrize("name", [*PLACES, "draws.npz"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_regular_files_of_the_folder_are_read(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "secret").write_text('{"secret": "hunter3"}')
    make: dict[str, Callable[[Path], None]] = {
        "link": lambda path: path.symlink_to(tmp_path / "secret"),
        "pipe": os.mkfifo,
        "folder": lambda path: path.mkdir(),
    }
    (folder / name).unlink(missing_ok=True)
    make[kind](folder / name)
    assert "hunter3" not in refused(folder, name)
    assert not (folder / "report.html").exists()


def test_names_control_no_terminal_and_hold_no_formula(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "\x1b]0;x\x07\x1b[2J $\\frac{"
    results = {f"{name}{i}/{score}": 0.5 for i in range(5) for score in ("CIDEr", "top1", f"{name}$")}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "not_run.json").write_text(json.dumps({name: name}))
    (folder / "environment.json").write_text(json.dumps({"command": name, "parameters": {name: 7}, "machine": name}))
    (folder / "samples" / f"{name.replace('/', '')}.png").write_bytes(b"")
    (folder / "samples" / "a_captions.json").write_text(json.dumps([SAMPLE | {"caption": name, "references": [name]}]))
    (folder / "metrics.csv").write_text(f"step,{name}_loss\n1,2.0\n2,Infinity\n")
    report([str(folder)])
    pages = [(folder / page).read_text() for page in ("report.html", "report.md")]
    report([str(folder), str(folder), "--output", str(folder / "both")])
    pages += [(folder / "both" / page).read_text() for page in ("report.html", "report.md")]
    assert all("frac" in page for page in pages)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "".join([*pages, capsys.readouterr().out]))


def test_a_name_in_an_error_controls_no_terminal(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        report([str(tmp_path / "\x1b[2J")])
    assert "\x1b" not in str(error.value)


def test_scores_without_end_are_not_drawn(folder: Path, tmp_path: Path) -> None:
    (folder / "results.json").write_text('{"x/CIDEr": Infinity, "x/top1": NaN, "y/top1": -Infinity}')
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_text(json.dumps(RUN))
    report([str(folder)])
    report([str(folder), str(other), "--output", str(tmp_path / "both")])


def test_a_job_with_a_record_of_another_type(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").write_text('{"status": 7}')
    refused(tmp_path, "job.json")

"""Runs of the tasks of the paper: on files in their original layouts, and on their built-in counterparts."""

from pathlib import Path

import pytest

from coca_lit.cli import evaluate
from coca_lit.cli.command import compose
from coca_lit.data.scenes import statements
from coca_lit.tools.prepare.scenes import export_scenes
from helpers.running import TINY, results, run

KINDS = {"entailment": ("colour", "count", "relation"), "comparison": ("more", "both", "one")}
WORDS = "+model.net.tokenizer=scenes_statements"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "further"),
    [
        ("nlvr2", ()),
        ("snli_ve", ()),
        ("pairs", ("model.objectives.labels.images=2",)),
    ],
)
def test_reasoning_on_files(name: str, further: tuple[str, ...], tmp_path: Path) -> None:
    export_scenes(name, tmp_path / name, count=8, size=32)
    files = (f"data.root={tmp_path / name}", "data.num_workers=0", "init_from=null", WORDS)
    run(tmp_path / "run", *TINY, f"experiment=finetune_{name}", *files, *further)
    found = set(results(tmp_path / "run"))
    kinds = {f"pairs/{kind}/accuracy" for kind in KINDS["comparison"]} if name == "pairs" else set()
    consistency = {"nlvr2/consistency"} if name == "nlvr2" else set()
    assert {f"{name}/accuracy", f"{name}/blind/accuracy"} | consistency <= found
    assert found <= {f"{name}/accuracy", f"{name}/blind/accuracy"} | consistency | kinds
    assert (tmp_path / "run" / "predictions" / f"{name}.json").is_file()
    words = [
        f"checkpoint={tmp_path}/run",
        f"evals={name}_labels",
        f"roots.{name}={tmp_path / name}",
        "scoring.split=val",
    ]
    cfg = compose("evaluate", [*words, f"output_dir={tmp_path}/scored", "scoring.images=8"])
    scores = evaluate.run(cfg)
    assert scores == pytest.approx(results(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("task", KINDS)
def test_reasoning_about_scenes(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(statements.COUNTS, "train", 24)  # for the blind guesses
    run(tmp_path, *TINY, f"experiment=scenes_{task}", "init_from=null", "data.train_count=16", "scoring.images=null")
    kinds = {f"scenes_{task}/{kind}/accuracy" for kind in KINDS[task]}
    assert set(results(tmp_path)) == {f"scenes_{task}/accuracy", f"scenes_{task}/blind/accuracy"} | kinds
    assert "statements about" in (tmp_path / "report.html").read_text()

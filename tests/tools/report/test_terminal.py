"""What a sweep ends with."""

import csv
import json
import re
import sys

import pytest

from coca_lit.metrics.uncertainty import Conditions
from coca_lit.runs.results import write_conditions
from coca_lit.tools.report.tables import best_run
from coca_lit.tools.report.terminal import report_sweep

LONG = "the loss is not finite in step 7, " * 10


@pytest.mark.parametrize("terminal", [True, False])
def test_table_of_a_sweep_fits_a_terminal_and_is_never_folded(terminal, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "80")
    scores = {
        f"{data}/{score}": 0.5 for data in ("scenes", "new_pairs") for score in ("t2i_recall@1", "CIDEr", "SPICE")
    }
    jobs = [{"job": "model.optimizer.lr=9", "status": "failed", "error": LONG}]
    for rate in ("0.1234567890123", "0.3"):
        jobs.append({"job": f"model.optimizer.lr={rate}", "status": "ok", **scores})
        (tmp_path / jobs[-1]["job"]).mkdir()
        (tmp_path / jobs[-1]["job"] / "config.yaml").write_text(f"model: {{optimizer: {{lr: {rate}}}}}\n")
        (tmp_path / jobs[-1]["job"] / "results.json").write_text(json.dumps(scores))
        write_conditions(tmp_path / jobs[-1]["job"], dict.fromkeys(scores, Conditions("val", 64, "i", 320, "t", {})))
    report_sweep(tmp_path, jobs, "new_pairs/CIDEr")
    shown = capsys.readouterr().out.splitlines()
    head, *rows = shown[1:5]
    assert max(map(len, [head, *rows])) <= 80 or not terminal
    assert re.split("  +", head.strip())[:3] == ["lr", "status", "new_pairs CIDEr"]
    assert ("built-in scenes text to image recall@1, %" in head) is not terminal
    assert rows[0].split()[:4] == ["lr=0.1234567890123", "0.1235", "ok", "50"]
    assert rows[2].split() == ["lr=9", "failed"]
    assert f"failed: model.optimizer.lr=9: {LONG.strip()}" in shown


def test_no_job_is_the_best_on_other_images(tmp_path, capsys):
    usual = Conditions("val", 64, "images", 320, "texts", {})
    jobs = [
        {"job": name, "split": name, "status": "ok", "x/CIDEr": score} for name, score in (("val", 0.5), ("test", 1.0))
    ]
    for other, best in ((usual, True), (usual._replace(image_digest="others"), False)):
        for job, conditions in zip(jobs, (usual, other), strict=True):
            (tmp_path / job["job"]).mkdir(exist_ok=True)
            (tmp_path / job["job"] / "results.json").write_text(json.dumps({"x/CIDEr": job["x/CIDEr"]}))
            write_conditions(tmp_path / job["job"], {"x/CIDEr": conditions})
        report_sweep(tmp_path, jobs, None)
        said = capsys.readouterr().out
        assert (f"in {tmp_path / 'test'}" in said) is best
        assert ["val", "ok", "50"] in [line.split() for line in said.splitlines()]  # of 64 images: no decimals


@pytest.mark.parametrize("objective", [None, "mine/right"])
def test_a_sweep_over_an_evaluation_of_ones_own(objective, tmp_path, capsys):
    jobs = [
        {"job": f"lr={lr}", "model.optimizer.lr": lr, "status": "ok", "mine/right": right, "mine/left": 1 - right}
        for lr, right in (("1e-4", 0.25), ("1e-3", 0.75))
    ]
    for job in jobs:
        (tmp_path / job["job"]).mkdir()
        scores = {name: job[name] for name in ("mine/right", "mine/left")}
        (tmp_path / job["job"] / "results.json").write_text(json.dumps(scores))
        write_conditions(tmp_path / job["job"], dict.fromkeys(scores, Conditions("val", 64, "i", 320, "t", {})))
    report_sweep(tmp_path, jobs, objective)
    said = capsys.readouterr().out
    assert ["lr=1e-3", "ok", "0.7500", "0.2500"] in [line.split() for line in said.splitlines()]
    assert (f"best mine/right: 0.7500 in {tmp_path / 'lr=1e-3'}" in said) is (objective is not None)
    assert ("scoring.objective=mine/right names the best run" in said) is (objective is None)


def test_no_value_of_a_sweep_is_a_formula_in_its_table(tmp_path):
    report_sweep(tmp_path, [{"job": "1", "model.name": "=1+1", "model.weight": "-2", "status": "ok"}], None)
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert (row["model.name"], row["model.weight"]) == ("'=1+1", "-2")


def test_best_run() -> None:
    results = {"a": {"x/CIDEr": 0.5, "x/i2t_median_rank": 9.0}, "b": {"x/CIDEr": float("nan")}, "c": {"x/CIDEr": 0.4}}
    assert best_run(results, "x/CIDEr") == "a"
    assert best_run(results | {"d": {"x/i2t_median_rank": 3.0}}, "x/i2t_median_rank") == "d"
    assert best_run(results, "y/CIDEr") is None

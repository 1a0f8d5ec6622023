"""What a sweep ends with."""

import csv
import json
import sys

import pytest

from coca_lit.metrics.uncertainty import Conditions
from coca_lit.runs.results import write_conditions
from coca_lit.tools.report.tables import best_run
from coca_lit.tools.report.terminal import print_jobs, report_sweep

LONG = "the loss is not finite in step 7, " * 10
JOBS = [
    {"job": f"model.optimizer.lr={rate}", "model.optimizer.lr": rate, "seed": "1", "model.net.pooler_queries": queries}
    | ({"status": "failed", "error": LONG} if rate == "9" else {"status": "ok", **scores})
    for rate, queries in (("0.1234567890123", "8"), ("9", "8"), ("0.3", "16"))
    for scores in [{f"{data}/{s}": 0.5 for data in ("scenes", "new_pairs") for s in ("t2i_recall@1", "CIDEr", "SPICE")}]
]


@pytest.mark.parametrize("terminal", [True, False])
def test_table_of_a_sweep_fits_a_terminal_and_is_never_folded(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "80")
    print_jobs(JOBS, "outputs/sweep", "new_pairs/CIDEr")
    shown = capsys.readouterr().out.splitlines()
    table = [line for line in shown[1:] if not line.startswith(("failed: ", "results.csv "))]
    assert max(map(len, table)) <= 80 or not terminal
    head = next(line for line in table if "status" in line).split()
    assert head[:5] == ["lr", "pooler_queries", "status", "new_pairs/CIDEr", "scenes/CIDEr"]  # seed does not vary
    assert ("scenes/t2i_recall@1" in head) is not terminal
    rows = [line.split() for line in table if "ok" in line or "failed" in line]
    assert rows == [
        ["0.1235", "8", "ok", *["50.00"] * (len(head) - 3)],
        ["9", "8", "failed"],
        ["0.3", "16", "ok", *["50.00"] * (len(head) - 3)],
    ]
    assert f"failed: lr=9, pooler_queries=8: {LONG.strip()}" in shown


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
        assert ["val", "ok", "50"] in map(str.split, said.splitlines())  # of 64 images: no decimals


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
    assert ["lr", "status", "mine/right", "mine/left"] in map(str.split, said.splitlines())
    assert ["1e-3", "ok", "0.7500", "0.2500"] in map(str.split, said.splitlines())
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

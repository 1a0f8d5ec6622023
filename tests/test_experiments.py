"""Recorded numbers: every table in a README is what its `results.csv` says."""

import csv
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/results.csv"))


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", ROOT / "experiments" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("study", STUDIES)
def test_readme_shows_the_recorded_results(study: str, report: ModuleType) -> None:
    folder = ROOT / "experiments" / study
    expected = report.table(report.update(folder / "results.csv", []))
    assert f"<!-- table:{study} -->\n{expected}\n<!-- /table -->" in (folder / "README.md").read_text()
    project = (ROOT / "README.md").read_text()
    if f"<!-- table:{study} -->" in project:
        assert expected in project
    assert f"({study}/README.md)" in (ROOT / "experiments" / "README.md").read_text()


def test_a_run_becomes_a_row_and_a_failed_one_too(tmp_path: Path, report: ModuleType) -> None:
    for name, results in (("good", {"scenes/CIDEr": 1.25}), ("failed", None)):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text("name: x\nseed: 3\n")
        (run / "environment.json").write_text(json.dumps({"command": "python train.py", "seconds": 7}))
        if results:
            (run / "results.json").write_text(json.dumps(results))
    rows = report.update(tmp_path / "results.csv", [tmp_path / "good", tmp_path / "failed"])
    assert [(r["run"], r["seed"], r.get("scenes/CIDEr")) for r in rows] == [
        ("good", "3", "1.2500"),
        ("failed", "3", None),
    ]
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [row["seconds"] for row in csv.DictReader(file)] == ["7", "7"]
    assert "| `scenes/CIDEr` | 1.2500 |  |  |" in report.table(rows)


def test_tables_of_the_benchmarks_are_those_of_their_csvs() -> None:
    spec = importlib.util.spec_from_file_location("benchmarks", ROOT / "experiments" / "benchmarks" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    benchmarks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmarks)
    for readme in benchmarks.READMES:
        assert benchmarks.write_tables(readme) == readme.read_text()

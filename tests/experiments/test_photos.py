"""The study of the small photo model: its tables show what is shipped, with the intervals of that run alone."""

import json
from pathlib import Path

import pytest

from experiments.photos import report


def test_intervals_are_those_of_the_shipped_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "INTERVALS", tmp_path / "intervals.csv")
    for run, limits in (("rewards", [0.1, 0.2]), ("shipped", [0.3, 0.5]), ("other", [0.6, 0.7])):
        (tmp_path / run).mkdir()
        intervals = {"flickr8k/CIDEr": limits, "flickr8k/vocabulary": [None, None]}
        (tmp_path / run / "intervals.json").write_text(json.dumps({"intervals": intervals}))
    report.add_curves([tmp_path / "rewards", tmp_path / "shipped", tmp_path / "other"])
    about = {"command": "coca-evaluate", "commit": "abc", "machine": "m", "torch": "t"}
    rows = {
        run: about | {"run": run, "flickr8k/CIDEr": value} for run, value in (("rewards", "0.45"), ("shipped", "0.4"))
    }
    table = report._scores(rows, ["rewards", "shipped"], ["flickr8k/CIDEr", "flickr8k/METEOR"])
    assert table.splitlines()[0] == "| score | as trained | as shipped, int8 | 95 % interval |"
    assert "| CIDEr | 45.00 | 40.00 | [30.00, 50.00] |" in table

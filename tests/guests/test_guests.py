"""A package outside coca_lit extends every part of a run, by its own configs and without a change to coca_lit."""

import json
import os
from pathlib import Path

from running import ROOT, results, train_py

GUESTS = Path(__file__).resolve().parent


def test_an_outside_package_trains(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(GUESTS)])
    command = ("--config-dir", str(GUESTS / "conf"), "experiment=guest", "trainer=smoke", f"output_dir={tmp_path}")
    done = train_py(*command, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "steps.txt").read_text() == "2"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "train/brightness_loss" in line]) == 2
    assert any("val/brightness_loss" in line for line in lines)
    assert 0 <= results(tmp_path)["patches/t2i_recall@1"] <= 1

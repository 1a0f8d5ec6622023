"""Sweeps of jobs that take no time, and of real trainings under torchrun: folders, records, the table, and the end."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from coca_lit.cli import sweep
from coca_lit.cli.sweep import RECORD, check_processes, check_search
from coca_lit.errors import ConfigError, DataError
from coca_lit.files import write_json
from helpers.disks import at_most
from helpers.forking import called
from helpers.running import ROOT, TINY, results
from helpers.sweeps import APP, jobs_of, rows_of, run_in

RATES = "model.optimizer.lr=0.1,2,0.3"  # the score of a job is its rate, and the second one fails


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        ([("unfinished", ""), ("unfinished", "")], ["none of the 2 jobs", "resumes"]),
        ([("failed", "no model survives 2"), ("unfinished", "")], ["none of the 2 jobs", "no model survives 2"]),
        ([("stopped", "stopped by a signal; the same command resumes it")] * 2, ["stopped by a signal"]),
        ([("ok", ""), ("unfinished", "")], ["1 of 2 jobs", "resumes"]),
        ([("ok", ""), ("failed", "out of luck")], ["error: out of luck"]),
    ],
    ids=["none ended", "one failed", "stopped", "one did not end", "one failed of two"],
)
def test_the_end_of_a_sweep_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[tuple[str, str]], said: list[str]
) -> None:
    for number, (status, error) in enumerate(jobs):
        (tmp_path / str(number)).mkdir()
        record = {"sweep": "this", "begun": number, "overrides": {"seed": str(number)}, "status": status}
        (tmp_path / str(number) / sweep.RECORD).write_text(json.dumps(record | ({"error": error} if error else {})))
    begun = sweep.Sweep("this", tmp_path, {}, {"seed"}, set(), None, None)
    monkeypatch.setattr(sweep, "_started", [begun])
    with pytest.raises(SystemExit) as end:
        sweep.end_sweep()
    message = str(end.value)
    assert message.startswith("error: ")
    assert all(words in message for words in said)
    assert not any(words in message for words in ("none;", "error: by", "\n"))
    assert not message.endswith(": none")


def assert_complete(done: subprocess.CompletedProcess[str], sweep: Path) -> None:
    """What every launcher must leave behind of `RATES`."""
    assert done.returncode == 1, done.stderr
    assert done.stderr.rstrip().endswith("error: no model survives 2.0")
    assert jobs_of(sweep) == {f"model.optimizer.lr={rate}" for rate in ("0.1", "2", "0.3")}
    rows = {row["model.optimizer.lr"]: row for row in rows_of(sweep)}
    assert {rate: row["status"] for rate, row in rows.items()} == {"0.1": "ok", "2": "failed", "0.3": "ok"}
    assert rows["2"]["error"] == "no model survives 2.0"
    assert float(rows["0.3"]["scenes/CIDEr"]) == 0.3
    assert f"best scenes/CIDEr: 30.00 in {sweep.relative_to(sweep.parents[2])}/model.optimizer.lr=0.3" in done.stdout
    assert "Traceback" in (sweep / "model.optimizer.lr=2" / "error.txt").read_text()
    assert (sweep / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "model.optimizer.lr=0.3" in (sweep / "report.html").read_text()


@pytest.mark.slow
def test_one_after_another_then_more_of_the_same(tmp_path: Path) -> None:
    """Fixed values name the sweep, varied ones its jobs; a second command adds to the same table."""
    name = "demo,+model.net.image_encoder_args.api_key=_hidden_,model.freeze=_a_b_,seed=1"
    fixed = ("seed=1", "threads=1", "model.freeze=[a/b]", "+model.net.image_encoder_args.api_key=hunter2")
    first = run_in(tmp_path, APP, "-m", RATES, *fixed)
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert re.fullmatch(f"{re.escape(name)}_[0-9a-f]{{8}}", sweep.name)
    assert_complete(first, sweep)
    assert len(first.stderr.splitlines()) == 1
    objective = "scoring.objective=scenes/i2t_median_rank"
    done = run_in(tmp_path, APP, "-m", "model.optimizer.lr=0.2,0.4", *fixed, objective)
    assert done.returncode == 0, done.stderr
    assert [row["model.optimizer.lr"] for row in rows_of(sweep)] == ["0.1", "2", "0.3", "0.2", "0.4"]
    written = [
        path.read_text() for path in sweep.rglob("*.*") if path.suffix in (".yaml", ".csv", ".html", ".md", ".txt")
    ]
    assert "hunter2" not in "".join([*written, first.stdout, first.stderr])
    assert f"best scenes/i2t_median_rank: 0.6 in {sweep.relative_to(tmp_path)}/model.optimizer.lr=0.4" in done.stdout


@pytest.mark.slow
def test_a_process_that_fails_beside_the_first_one_says_why(tmp_path: Path) -> None:
    done = run_in(tmp_path, APP, "-m", "model.optimizer.lr=0", RANK="1")
    assert "Traceback" in done.stderr
    assert "RuntimeError: no model learns at 0.0" in done.stderr


def test_values_of_the_command_line_stand_in_place_of_a_grid(tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    grid = "# @package _global_\nhydra: {sweeper: {params: {model.optimizer.lr: '0.1,0.2,0.3', seed: '1,2'}}}\n"
    (tmp_path / "mine" / "experiment" / "rates.yaml").write_text(grid)
    done = run_in(tmp_path, APP, "-m", "--config-dir", "mine", "experiment=rates", "model.optimizer.lr=0.5")
    assert done.returncode == 0, done.stderr
    (table,) = (tmp_path / "outputs" / "sweeps").glob("*/results.csv")
    rows = rows_of(table.parent)
    assert [row["seed"] for row in rows] == ["1", "2"]
    assert {float(row["scenes/CIDEr"]) for row in rows} == {0.5}


class OneByOne:
    """A launcher."""

    one_process_per_job = True


def test_one_process_launchers_refuse_large_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"launcher": {"_target_": f"{__name__}.OneByOne"}, "sweeper": {}, "mode": RunMode.MULTIRUN}
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(config))
    check_processes(1)
    with pytest.raises(ConfigError, match=r"OneByOne .*8.*trainer\.devices=1"):
        check_processes(8)
    config |= {"launcher": {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}}
    check_processes(8)
    config |= {"sweeper": {"direction": "maximize"}}
    with pytest.raises(ConfigError, match=r"each of 8 processes would ask the search"):
        check_processes(8)
    config |= {"mode": RunMode.RUN}
    check_processes(8)


def test_a_search_needs_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    own, captions = (SimpleNamespace(name="mine", score_names=[name], final_score_names=()) for name in ("x", "CIDEr"))
    check_search([own])  # type: ignore[list-item]
    found = SimpleNamespace(mode=RunMode.MULTIRUN, sweeper={"direction": "maximize"})
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: found)
    check_search([own, captions])  # type: ignore[list-item]
    check_search([SimpleNamespace(name="own", score_names=(), final_score_names=())])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"scoring\.objective: .*mine/x"):
        check_search([own])  # type: ignore[list-item]
    found.mode = RunMode.RUN  # a single run, whose config names the sweeper
    check_search([own])  # type: ignore[list-item]


def record_twice(job: Path) -> None:
    write_json(job / RECORD, {"status": "unfinished"})
    at_most(10)
    with pytest.raises(DataError, match=r"cannot write .*job\.json"):
        write_json(job / RECORD, {"status": "ok"})
    at_most(None)
    assert json.loads((job / RECORD).read_text()) == {"status": "unfinished"}


def test_a_full_disk_leaves_the_earlier_record_of_a_job(tmp_path: Path) -> None:
    called(record_twice, tmp_path)


# Real training, two processes


@pytest.mark.slow
def test_torchrun_sweep(tmp_path: Path) -> None:
    """All ranks use the same folders, a job that fails does not stop the next, and one process tells the outcome."""
    rates = "model.optimizer.lr=abc,2e-3"
    sweep = tmp_path / "sweep"
    train = (str(ROOT / "train.py"), "-m", *TINY, "evals=[scenes_retrieval]", rates, "hydra.sweep.dir=sweep")
    done = run_in(tmp_path, *train, "trainer.devices=2", "trainer.strategy=ddp", ranks=2)
    assert done.returncode == 1
    assert "error: model.optimizer.lr must be a number" in done.stderr
    assert [row["status"] for row in rows_of(sweep)] == ["failed", "ok"]
    assert jobs_of(sweep) == {f"model.optimizer.lr={rate}" for rate in ("abc", "0.002")}
    assert done.stdout.count("best scenes/t2i_recall@1") == 1
    assert results(sweep / "model.optimizer.lr=0.002").keys() >= {"scenes/t2i_recall@1"}
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


@pytest.mark.slow
def test_a_sweep_whose_processes_lightning_starts(tmp_path: Path) -> None:
    """For each of them Lightning asks Hydra for the folder of the run, which is named after the time."""
    train = (str(ROOT / "train.py"), "-m", *TINY, "evals=[scenes_retrieval]", "model.optimizer.lr=1e-3,2e-3")
    done = run_in(tmp_path, sys.executable, *train, "trainer.devices=2", "trainer.strategy=ddp")
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert [row["status"] for row in rows_of(sweep)] == ["ok", "ok"]

"""Sweeps with processes and with Optuna on jobs that take no time, and real training under torchrun. Launchers that
need a cluster are in test_slurm.py and test_ray.py.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from coca_lit.cli import train as cli
from coca_lit.cli.sweep import RECORD, check_processes, check_study
from coca_lit.errors import ConfigError, DataError
from coca_lit.files import write_json
from coca_lit.runs.launch import RUN_ID, job_folder, run_id
from coca_lit.tools.clusters import launchers
from coca_lit.tools.clusters.study import OptunaSweeper, distribution
from helpers.disks import at_most
from helpers.forking import Program, called
from helpers.running import ROOT, TINY, compose, results

APP = str(ROOT / "tests" / "helpers" / "sweep_app.py")
RATES = "model.optimizer.lr=0.1,2,0.3"  # the score of a job is its rate, and the second one fails

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run(*command, **environment)` in an empty folder; a Python file is forked from what is imported already."""

    def call(*command: str, ranks: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        drop = ("PL_", "COV_", "SLURM_", "TORCHELASTIC_")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
        own = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        own |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        env = inherited | own | environment
        if command[0].endswith(".py"):
            return Program(*command, cwd=tmp_path, environment=env, ranks=ranks).wait()
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)

    return call


def rows_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def jobs_of(sweep: Path) -> set[str]:
    return {path.name for path in sweep.iterdir() if path.is_dir() and not path.name.startswith(".")}


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


# Launchers


@pytest.mark.slow
def test_one_after_another_then_more_of_the_same(run: Run, tmp_path: Path) -> None:
    """Fixed values name the sweep, varied ones its jobs; a second command adds to the same table."""
    name = "demo,+model.net.image_encoder_args.api_key=_hidden_,model.freeze=_a_b_,seed=1"
    fixed = ("seed=1", "threads=1", "model.freeze=[a/b]", "+model.net.image_encoder_args.api_key=hunter2")
    first = run(APP, "-m", RATES, *fixed)
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert re.fullmatch(f"{re.escape(name)}_[0-9a-f]{{8}}", sweep.name)
    assert_complete(first, sweep)
    assert len(first.stderr.splitlines()) == 1
    objective = "scoring.objective=scenes/i2t_median_rank"
    done = run(APP, "-m", "model.optimizer.lr=0.2,0.4", *fixed, objective)
    assert done.returncode == 0, done.stderr
    assert [row["model.optimizer.lr"] for row in rows_of(sweep)] == ["0.1", "2", "0.3", "0.2", "0.4"]
    written = [
        path.read_text() for path in sweep.rglob("*.*") if path.suffix in (".yaml", ".csv", ".html", ".md", ".txt")
    ]
    assert "hunter2" not in "".join([*written, first.stdout, first.stderr])
    assert f"best scenes/i2t_median_rank: 0.6 in {sweep.relative_to(tmp_path)}/model.optimizer.lr=0.4" in done.stdout


@pytest.mark.slow
def test_processes_side_by_side_of_which_one_is_killed(run: Run, tmp_path: Path) -> None:
    """All others are awaited and shown; the dead one has its reason, also where it had begun."""
    pytest.importorskip("cloudpickle")
    rates = "model.optimizer.lr=0.1,109,0.3,115"
    done = run(APP, "-m", "hydra/launcher=joblib_jobs", "hydra.launcher.n_jobs=4", rates)
    sweep = tmp_path / "outputs" / "sweeps" / "demo"
    rows = {row["model.optimizer.lr"]: row for row in rows_of(sweep)}
    statuses = {rate: row["status"] for rate, row in rows.items()}
    assert statuses == {"0.1": "ok", "109": "failed", "0.3": "ok", "115": "stopped"}
    assert rows["109"]["error"].startswith("job 1: killed by SIGKILL")
    assert done.returncode == 1
    assert "error: job 1: killed by SIGKILL" in done.stderr
    assert "Traceback" not in done.stderr
    assert "best scenes/CIDEr: 30.00" in done.stdout
    assert len({path.read_text() for path in tmp_path.rglob("rank.txt")}) == 2


@pytest.mark.slow
def test_a_process_that_fails_beside_the_first_one_says_why(run: Run) -> None:
    done = run(APP, "-m", "model.optimizer.lr=0", RANK="1")
    assert "Traceback" in done.stderr
    assert "RuntimeError: no model learns at 0.0" in done.stderr


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    for plugin, group, extra in (
        (launchers.SlurmLauncher, "launcher/slurm_jobs", "slurm"),
        (launchers.JoblibLauncher, "launcher/joblib_jobs", "joblib"),
        (launchers.RayLauncher, "launcher/ray_jobs", "ray"),
        (OptunaSweeper, "sweeper/optuna_study", "optuna"),
    ):
        config = yaml.safe_load((ROOT / f"conf/hydra/{group}.yaml").read_text())
        arguments = {key: value for key, value in config.items() if key[0] != "_" and key != "defaults"}
        with pytest.raises(ConfigError, match=rf"pip install -e '\.\[{extra}\]'"):
            plugin(**arguments)


@pytest.mark.parametrize("processors", [5, None])
def test_the_tasks_of_a_slurm_job_get_its_processors(
    processors: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`srun` knows them from a variable alone; what the user sets up comes after."""
    pytest.importorskip("submitit")
    for name, answer in (("sbatch", f"cp $1 {tmp_path}/script; echo Submitted batch job 7"), ("srun", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    options: dict[str, Any] = {"cpus_per_task": processors, "setup": ["module load own"]}
    launchers.SlurmLauncher(str(tmp_path / "jobs"), 1, **options)._submit([print])
    lines = (tmp_path / "script").read_text().splitlines()
    told = "export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
    assert [line for line in lines if line in (told, "module load own") or line.startswith("srun")][:-1] == (
        [told, "module load own"] if processors else ["module load own"]
    )


def test_a_job_that_is_requeued_has_no_result() -> None:
    """Even if SLURM's SIGTERM, which comes with it, ends the run first: else the sweep would be over for this job."""
    pytest.importorskip("submitit")
    before = signal.getsignal(signal.SIGTERM)
    submitted = launchers.SubmittedJob(lambda: submitted.checkpoint())  # type: ignore[arg-type]
    try:
        with pytest.raises(SystemExit):
            submitted()
        assert not submitted.checkpoint().function.requeued
    finally:
        signal.signal(signal.SIGTERM, before)


def test_one_process_launchers_refuse_large_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    config = {"launcher": {"_target_": "x.JoblibLauncher"}, "sweeper": {}, "mode": RunMode.MULTIRUN}
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(config))
    check_processes(1)
    with pytest.raises(ConfigError, match=r"8.*trainer\.devices=1"):
        check_processes(8)
    config |= {"launcher": {"_target_": "x.BasicLauncher"}}
    check_processes(8)
    config |= {"sweeper": {"_target_": "x.OptunaSweeper"}}
    with pytest.raises(ConfigError, match=r"each of 8 processes would ask the study"):
        check_processes(8)
    config |= {"mode": RunMode.RUN}
    check_processes(8)


def test_values_of_the_command_line_stand_in_place_of_a_grid(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "scaling").mkdir(parents=True)
    grid = "# @package _global_\nhydra: {sweeper: {params: {model.optimizer.lr: '0.1,0.2,0.3', seed: '1,2'}}}\n"
    (tmp_path / "mine" / "scaling" / "rates.yaml").write_text(grid)
    done = run(APP, "-m", "--config-dir", "mine", "scaling=rates", "model.optimizer.lr=0.5")
    assert done.returncode == 0, done.stderr
    (table,) = (tmp_path / "outputs" / "sweeps").glob("*/results.csv")
    rows = rows_of(table.parent)
    assert [row["seed"] for row in rows] == ["1", "2"]
    assert {float(row["scenes/CIDEr"]) for row in rows} == {0.5}


# Optuna


@pytest.mark.slow
def test_optuna_study_survives_failures_and_goes_on(run: Run, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    study = ("hydra/sweeper=optuna_study", "model.optimizer.lr=0.5,0.6,7", "hydra.sweeper.n_trials=5")
    grid = ("hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=1")  # tries all three
    sweep = tmp_path / "outputs" / "sweeps" / "demo"
    done = run(APP, "-m", *study, *grid)
    assert done.returncode == 0, done.stderr
    statuses = {row["model.optimizer.lr"]: row["status"] for row in rows_of(sweep)}
    assert statuses == {"0.5": "ok", "0.6": "ok", "7": "failed"}
    assert "best scenes/CIDEr: 60.00 in outputs/sweeps/demo/model.optimizer.lr=0.6" in done.stdout

    storage = f"sqlite:///{sweep}/optuna.db"
    optuna.load_study(study_name="demo None", storage=storage).ask()  # of a process that was killed
    done = run(APP, "-m", *study, "hydra.sweeper.n_trials=1")
    assert done.returncode == 0, done.stderr
    assert "Best value: 0.6" in done.stdout  # Optuna's, from trials of both commands
    assert len(rows_of(sweep)) == 3
    states = [trial.state.name for trial in optuna.load_study(study_name="demo None", storage=storage).trials]
    assert len(states) == 7
    assert {"COMPLETE", "FAIL"} == set(states)

    done = run(APP, "-m", *study, "model.optimizer.lr=interval(0.1,0.2)")
    assert "error: the study 'demo None'" in done.stderr


def test_a_study_needs_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    own, captions = (SimpleNamespace(name="mine", score_names=[name], final_score_names=()) for name in ("x", "CIDEr"))
    check_study([own])  # type: ignore[list-item]
    sweeper = {"_target_": "coca_lit.tools.clusters.study.OptunaSweeper"}
    found = SimpleNamespace(mode=RunMode.MULTIRUN, sweeper=sweeper)
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: found)
    check_study([own, captions])  # type: ignore[list-item]
    check_study([SimpleNamespace(name="own", score_names=(), final_score_names=())])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"scoring\.objective: .*mine/x"):
        check_study([own])  # type: ignore[list-item]
    found.mode = RunMode.RUN  # a single run, whose config names the sweeper
    check_study([own])  # type: ignore[list-item]


def test_search_spaces_follow_the_grammar_of_hydra() -> None:
    pytest.importorskip("optuna")
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    wanted = {
        "0.1,0.2": CategoricalDistribution([0.1, 0.2]),
        "choice(a,b)": CategoricalDistribution(["a", "b"]),
        "range(1,8,2)": IntDistribution(1, 7, step=2),
        "range(0,1,0.25)": FloatDistribution(0, 0.75, step=0.25),
        "interval(0,0.5)": FloatDistribution(0, 0.5),
        "int(interval(1,16))": IntDistribution(1, 16),
        "tag(log,interval(1e-4,1e-2))": FloatDistribution(1e-4, 1e-2, log=True),
    }
    parser = OverridesParser.create()
    assert {text: distribution(parser.parse_override(f"x={text}")) for text in wanted} == wanted


# Real training, two processes


@pytest.mark.slow
def test_torchrun_sweep(run: Run, tmp_path: Path) -> None:
    """All ranks use the same folders, a job that fails does not stop the next, and one process tells the outcome."""
    rates = "model.optimizer.lr=abc,2e-3"
    sweep = tmp_path / "sweep"
    train = (str(ROOT / "train.py"), "-m", *TINY, "evals=[scenes_retrieval]", rates, "hydra.sweep.dir=sweep")
    done = run(*train, "trainer.devices=2", "trainer.strategy=ddp", ranks=2)
    assert done.returncode == 1
    assert "error: model.optimizer.lr must be a number" in done.stderr
    assert [row["status"] for row in rows_of(sweep)] == ["failed", "ok"]
    assert jobs_of(sweep) == {f"model.optimizer.lr={rate}" for rate in ("abc", "0.002")}
    assert done.stdout.count("best scenes/t2i_recall@1") == 1
    assert results(sweep / "model.optimizer.lr=0.002").keys() >= {"scenes/t2i_recall@1"}
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


@pytest.mark.slow
def test_a_sweep_whose_processes_lightning_starts(run: Run, tmp_path: Path) -> None:
    """For each of them Lightning asks Hydra for the folder of the run, which is named after the time."""
    train = (str(ROOT / "train.py"), "-m", *TINY, "evals=[scenes_retrieval]", "model.optimizer.lr=1e-3,2e-3")
    done = run(sys.executable, *train, "trainer.devices=2", "trainer.strategy=ddp")
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert [row["status"] for row in rows_of(sweep)] == ["ok", "ok"]


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "MASTER_PORT": "1"}
    for name, value in (told | {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "tests"}).items():
        monkeypatch.setenv(name, value)
    words = (*TINY, "trainer.strategy=ddp", f"output_dir={tmp_path}", "name=test")
    expected = r"2 processes were started, but this configuration trains with 1 \(trainer\.devices=1\)"
    with pytest.raises(ConfigError, match=expected):
        cli.run(compose(*words))


# Names


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, "slurm_7"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "TORCHELASTIC_RUN_ID": "x"}, "slurm_7_2"),
        ({"TORCHELASTIC_RUN_ID": "abc", "WORLD_SIZE": "4"}, "torchrun_abc"),
    ],
)
def test_run_id(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert run_id() == name


def test_run_id_is_the_time_of_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # in an allocation, but not under srun: several runs may share it
    assert run_id().startswith("20")
    monkeypatch.delenv(RUN_ID)  # another process, which torchrun has started
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="name=my_run"):
        run_id()


def test_processes_that_lightning_starts_know_the_time_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    name = run_id()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "getppid", os.getpid)  # as in a child
    assert run_id() == name


@pytest.mark.parametrize(
    ("environment", "sizes"),
    [
        ({}, ("auto", 1)),
        ({"SLURM_NTASKS": "18", "SLURM_NNODES": "3"}, ("auto", 1)),  # an allocation without srun
        ({"SLURM_NTASKS": "18", "SLURM_NNODES": "3", "SLURM_STEP_ID": "0"}, (6, 3)),
        ({"SLURM_NTASKS": "3", "SLURM_STEP_ID": "0", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "3"}, (8, 3)),
    ],
)
def test_sizes_come_from_the_launcher(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], sizes: tuple[int | str, int]
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    for name in ("auto", "ddp", "fsdp"):
        trainer = compose(f"trainer={name}").trainer
        assert (trainer.devices, trainer.num_nodes) == sizes


def test_job_folders() -> None:
    assert job_folder("data.root=x,model.optimizer.lr=1e-05") == "data.root=x,model.optimizer.lr=1e-05"
    folders = [job_folder(f"data.root={root}") for root in ("/d/a/b", "/d/a_b", "/d/a b")]
    assert len(set(folders)) == 3
    assert all(re.fullmatch(r"data\.root=_d_a_b_[0-9a-f]{8}", folder) for folder in folders)
    assert job_folder("++model.label_smoothing=0.1,seed=1") == "model.label_smoothing=0.1,seed=1"
    assert job_folder("") == "job"
    assert job_folder("logger.x.api_key=hunter2,seed=1").startswith("logger.x.api_key=_hidden_,seed=1_")
    long = [job_folder("a=" + "1" * 300 + end) for end in "xy"]
    assert long[0] != long[1]
    assert all(len(name) < 200 for name in long)
    assert len(job_folder("name=" + "ж" * 200).encode()) < 200


def test_a_full_disk_leaves_the_earlier_record_of_a_job(tmp_path: Path) -> None:
    called(record_twice, tmp_path)


def record_twice(job: Path) -> None:
    write_json(job / RECORD, {"status": "unfinished"})
    at_most(10)
    with pytest.raises(DataError, match=r"cannot write .*job\.json"):
        write_json(job / RECORD, {"status": "ok"})
    at_most(None)
    assert json.loads((job / RECORD).read_text()) == {"status": "unfinished"}

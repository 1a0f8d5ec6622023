"""Launchers, the sweeper and options of engines; test_slurm.py and test_ray.py have what needs a cluster."""

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import flag_override

from coca_lit.cli.command import compose
from coca_lit.cli.sweep import check_processes
from coca_lit.errors import ConfigError
from coca_lit.projects.clusters import launchers
from coca_lit.projects.clusters.engines import Slurm
from coca_lit.projects.clusters.study import OptunaSweeper, distribution
from coca_lit.tools.engines import engine_from
from helpers.sweeps import APP, rows_of, run_in

CONF = Path(launchers.__file__).with_name("conf")


@pytest.mark.slow
def test_processes_side_by_side_of_which_one_is_killed(tmp_path: Path) -> None:
    """All others are awaited and shown; the dead one has its reason, also where it had begun."""
    pytest.importorskip("cloudpickle")
    rates = "model.optimizer.lr=0.1,109,0.3,115"
    done = run_in(tmp_path, APP, "-m", "hydra/launcher=joblib_jobs", "hydra.launcher.n_jobs=4", rates)
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hydra/launcher=joblib_jobs"], "JoblibLauncher runs each job in one process, and this job wants 8"),
        (["hydra/launcher=ray_jobs"], "RayLauncher runs each job in one process"),
        (["hydra/launcher=slurm_jobs"], None),
        (["hydra/launcher=slurm_jobs", "hydra/sweeper=optuna_study"], None),
        (["hydra/sweeper=optuna_study"], "each of 8 processes would ask the search"),
    ],
)
def test_large_jobs_are_for_slurm(words: list[str], said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose("train", words, with_hydra=True)
    with flag_override(cfg, ["struct", "readonly"], [False, False]):
        cfg.hydra.mode = RunMode.MULTIRUN
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: cfg.hydra)
    with pytest.raises(ConfigError, match=said) if said else nullcontext():
        check_processes(8)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    for plugin, group, extra in (
        (launchers.SlurmLauncher, "launcher/slurm_jobs", "slurm"),
        (launchers.JoblibLauncher, "launcher/joblib_jobs", "joblib"),
        (launchers.RayLauncher, "launcher/ray_jobs", "ray"),
        (OptunaSweeper, "sweeper/optuna_study", "optuna"),
    ):
        config = yaml.safe_load((CONF / f"hydra/{group}.yaml").read_text())
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


# Optuna


@pytest.mark.slow
def test_optuna_study_survives_failures_and_goes_on(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    study = ("hydra/sweeper=optuna_study", "model.optimizer.lr=9", "model.optimizer.lr=0.5,0.6,7")  # the last counts
    study += ("hydra.sweeper.n_trials=5",)
    grid = ("hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=1")  # tries all three
    sweep = tmp_path / "outputs" / "sweeps" / "demo"
    done = run_in(tmp_path, APP, "-m", *study, *grid)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("error: no model survives 7.0")
    statuses = {row["model.optimizer.lr"]: row["status"] for row in rows_of(sweep)}
    assert statuses == {"0.5": "ok", "0.6": "ok", "7": "failed"}
    assert "best scenes/CIDEr: 60.00 in outputs/sweeps/demo/model.optimizer.lr=0.6" in done.stdout

    storage = f"sqlite:///{sweep}/optuna.db"
    optuna.load_study(study_name="demo None", storage=storage).ask()  # of a process that was killed
    done = run_in(tmp_path, APP, "-m", *study, "hydra.sweeper.n_trials=1")
    assert "Best value: 0.6" in done.stdout  # Optuna's, from trials of both commands
    assert len(rows_of(sweep)) == 3
    states = [trial.state.name for trial in optuna.load_study(study_name="demo None", storage=storage).trials]
    assert done.returncode == int(states[-1] == "FAIL"), done.stderr
    assert len(states) == 7
    assert {"COMPLETE", "FAIL"} == set(states)

    done = run_in(tmp_path, APP, "-m", *study, "scoring.objective=val/loss")
    assert done.stderr == "error: scoring.objective=val/loss needs hydra.sweeper.direction=minimize, got maximize\n"
    done = run_in(tmp_path, APP, "-m", *study, "model.optimizer.lr=interval(0.1,0.2)")
    assert "error: the study 'demo None'" in done.stderr


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


# Engines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("engine=slrum", "'engine' has no option 'slrum'; did you mean 'slurm'"),
        ("engine=slurm engine.tasks_per_node=8", "engine.nodes and engine.tasks_per_node must be 1"),
        ("engine=slurm engine.shards_per_job=0", "engine.shards_per_job must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_sentence(words: str, message: str) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError) as raised:
        engine_from(words.split())
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_keys_of_launchers_are_keys_of_engines() -> None:
    pytest.importorskip("submitit")
    words = ["engine=slurm", "engine.partition=gpu", "engine.timeout_min=7", "engine.shards_per_job=3"]
    engine = engine_from(words, ["cpu", "cpu"])
    assert isinstance(engine, Slurm)
    assert (engine.options["partition"], engine.options["timeout_min"], engine.size) == ("gpu", 7, 3)
    assert engine.machine.devices == ["cpu", "cpu"]  # of `coca-data check … --workers 2`
    assert engine_from(words).machine.devices is None  # a model has the GPU of its job

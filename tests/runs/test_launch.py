"""What a run is called, and how many processes it has: by torchrun, srun or the clock."""

import os
import re
from pathlib import Path

import pytest

from coca_lit.cli import train as cli
from coca_lit.errors import ConfigError
from coca_lit.runs.launch import RUN_ID, job_folder, run_id
from helpers.running import TINY, compose


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


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "MASTER_PORT": "1"}
    for name, value in (told | {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "tests"}).items():
        monkeypatch.setenv(name, value)
    words = (*TINY, "trainer.strategy=ddp", f"output_dir={tmp_path}", "name=test")
    expected = r"2 processes were started, but this configuration trains with 1 \(trainer\.devices=1\)"
    with pytest.raises(ConfigError, match=expected):
        cli.run(compose(*words))


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

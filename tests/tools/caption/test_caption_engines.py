"""`coca-caption … engine=…` on shards: the same bytes as from one process."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coca_lit.errors import ConfigError, DataError
from coca_lit.tools.caption import outputs
from coca_lit.tools.caption.inputs import OpenShard
from helpers.applying import caption, fill
from helpers.running import ROOT
from helpers.shard_jobs import RECAPTION, contents, shards_to_caption


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, shards/, and in expected/ what one process writes."""
    folder = fill(tmp_path_factory.mktemp("engines"), photos=0, samples=8, per_shard=2)
    caption(*words(folder), f"output={folder}/expected")
    return folder


def words(folder: Path) -> list[str]:
    sampled = ("generate.strategy=sample", "batch_size=2", "threads=1")
    return [f"checkpoint={folder}/tiny.safetensors", f"images=[{folder}/shards]", *sampled]


@pytest.mark.slow
def test_an_engine_writes_the_same_and_goes_on(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Where one shard fails, the others are written, and the same command tries it alone."""
    command = (*words(folder), f"output={tmp_path}/new", "engine=gpus", "engine.devices=[cpu]")
    written: list[str] = []

    def failing(write: Callable[..., None], source: OpenShard, *rest: object) -> None:
        written.append(source.path.name)
        if written.count("00001.tar") == 1 and source.path.name == "00001.tar":
            raise DataError("cannot write it")
        write(source, *rest)

    real = outputs.write_shard
    monkeypatch.setattr(outputs, "write_shard", lambda *arguments: failing(real, *arguments))
    with pytest.raises(DataError, match="1 of 4"):
        caption(*command)
    said = capsys.readouterr().err
    assert f"failed: {folder}/shards/00001.tar: cannot write it" in said
    assert "6 images in " in said
    assert said.rstrip().endswith("4 shards: 3 done, 0 skipped (finished before), 1 failed")
    caption(*command)
    assert capsys.readouterr().err.rstrip().endswith("4 shards: 1 done, 3 skipped (finished before), 0 failed")
    assert written == [f"0000{i}.tar" for i in (0, 1, 2, 3, 1)]
    assert contents(tmp_path / "new") == contents(folder / "expected")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("output=c.jsonl",), "output=FOLDER"),
        (("output=null",), "output=FOLDER"),
        (("generate.num_beams=0",), "generate: num_beams"),
    ],
)
def test_mistakes_are_told_before_any_job_starts(folder: Path, tmp_path: Path, changes, message: str) -> None:
    command = (*words(folder), f"output={tmp_path}/new", "engine=gpus", "engine.devices=[cpu,cpu]")
    with pytest.raises(ConfigError, match=message):
        caption(*command, *changes)


@pytest.mark.slow
def test_a_process_per_device_of_which_one_is_killed(tmp_path: Path) -> None:
    expected = shards_to_caption(tmp_path)
    command = (sys.executable, "-m", "coca_lit.tools.caption", *RECAPTION, "engine=gpus", "engine.devices=[cpu,cpu]")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    assert done.stderr.rstrip().endswith("6 shards: 6 done, 0 skipped (finished before), 0 failed")
    assert contents(tmp_path / "new") == expected

"""One process at a time in a run folder, and none that is dead."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as L
import pytest

from coca_lit.cli import command, evaluate, train
from coca_lit.errors import ConfigError, DataError
from coca_lit.runs import run_folder
from coca_lit.runs.run_folder import PATIENCE, add_to_environment, in_use
from helpers.running import ROOT, TINY, compose, run, watched

HOLD = """
import os, sys, time
from pathlib import Path
from coca_lit.runs.run_folder import in_use
with in_use(Path(sys.argv[1])):
    if sys.argv[2:] and os.fork() == 0:  # a data worker, which notices the end of its parent late
        time.sleep(1)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`hold(folder, *words)`: another process that holds the folder."""
    started = []

    def start(folder: Path, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(folder), *words]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_second_process_is_refused_and_nothing_is_touched(tmp_path: Path, hold: Callable) -> None:
    process = hold(tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    said = rf"{process.pid} .*{socket.gethostname()}.* 20\d\d-"
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=said) as caught:
        train.run(compose(f"output_dir={tmp_path}/run", "name=x"))
    assert time.monotonic() - begun < PATIENCE  # which is for a holder that is gone
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_holder_that_cannot_be_asked_is_not_waited_for(tmp_path: Path, hold: Callable) -> None:
    hold(tmp_path / "run")
    holder = {"process": 10**30, "host": socket.gethostname(), "since": "today"}
    (tmp_path / "run" / ".lock.json").write_text(json.dumps(holder))
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="since today"), in_use(tmp_path / "run"):
        pass
    assert time.monotonic() - begun < PATIENCE


@pytest.mark.parametrize("words", [(), ("worker",)])
def test_killed_process_holds_nothing(tmp_path: Path, hold: Callable, words: tuple[str, ...]) -> None:
    process = hold(tmp_path / "run", *words)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with in_use(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_run_whose_folder_was_moved_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"

    class Moves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 2:
                folder.rename(tmp_path / "moved")

    with watched(Moves()):
        run(folder, *TINY, "evals=[]", "callbacks.checkpoint.every_n_steps=1", "trainer.max_steps=4")
    said = [record.getMessage() for record in caplog.records if "was moved or deleted" in record.getMessage()]
    assert [text.partition(":")[0] for text in said] == [f"{folder} was moved or deleted"]
    assert (tmp_path / "moved" / "checkpoints" / "step_1.ckpt").exists()
    assert (folder / "checkpoints" / "step_4.ckpt").exists()


def test_a_folder_whose_name_controls_the_terminal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\\x1b\[2Jb' has characters that control"), in_use(tmp_path / "a\x1b[2Jb"):
        pass
    assert not [*tmp_path.iterdir()]


def test_only_the_first_process_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_use(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
        monkeypatch.setenv("RANK", "1")
        with in_use(tmp_path / "run"):
            pass
        monkeypatch.delenv("RANK")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_run_counts_from_the_start_of_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_began", None)
    now = time.time()
    assert now <= run_folder.environment()["started"] <= time.time()
    run_folder.begin_at(now - 20)
    assert run_folder.environment()["started"] == now - 20


def test_facts_are_added_to_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"commit": "abc", "samples": 1}')
    expected = {"commit": "abc", "samples": 2, "seconds": 3}
    assert add_to_environment(tmp_path, {"samples": 2, "seconds": 3}) == expected
    assert json.loads((tmp_path / "environment.json").read_text()) == expected


def test_the_commit_is_that_of_the_package_and_not_of_a_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@y", "-C", str(tmp_path))
        return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True).stdout.strip()

    (file := tmp_path / ".venv" / "run_folder.py").parent.mkdir()
    file.touch()
    git("init")
    git("commit", "--allow-empty", "--message=theirs")
    monkeypatch.setattr(run_folder, "__file__", str(file))
    assert run_folder.commit() == ""
    git("add", ".")
    git("commit", "--message=ours")
    assert run_folder.commit() == git("rev-parse", "--short", "HEAD")


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"the run folder .* cannot be written: Not a directory"),
        in_use(tmp_path / "file" / "run"),
    ):
        pass


def training(folder: Path, *overrides: str) -> None:
    train.run(compose(*TINY, f"output_dir={folder}", "name=x", "evals=[]", *overrides))


def scoring(folder: Path) -> None:
    evaluate.run(command.compose("evaluate", ["checkpoint=photos", "evals=[scenes_captions]", f"output_dir={folder}"]))


@pytest.mark.parametrize("start", [training, scoring])
def test_a_folder_that_no_run_wrote_stays_as_it_is(tmp_path: Path, start: Callable[[Path], None]) -> None:
    """A table of somebody's measurements has the name of our log, and a step column, too."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a.txt").write_text("mine")
    (tmp_path / "metrics.csv").write_text("step,price\n0,1\n900000,3\n")
    (tmp_path / "environment.json").write_text('{"jobs": {}, "command": "mine"}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    said = r"holds metrics\.csv, samples, environment\.json, and no environment\.json that a run of coca_lit wrote"
    with pytest.raises(ConfigError, match=said):
        start(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_folder_with_the_name_of_a_link_stays(tmp_path: Path, name: str) -> None:
    """In the folder of a run that died before its first checkpoint, and of one that has scores."""
    environment = {"command": "x", "started": "x", "lightning": "2"}
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    diary = tmp_path / "checkpoints" / name / "diary.txt"
    diary.parent.mkdir(parents=True)
    diary.write_text("mine")
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"{name} is a folder, and no run wrote it: move it away"):
            training(tmp_path)
        assert [path.name for path in tmp_path.rglob("*.txt")] == ["diary.txt"]
        assert diary.read_text() == "mine"
        (tmp_path / "results.json").write_text("{}")


@pytest.mark.parametrize(
    "link",
    ["checkpoints", "checkpoints/step_9.ckpt", "checkpoints/last.ckpt", "metrics.csv", "bad_steps.jsonl", "samples"],
)
def test_a_run_folder_with_a_link_out_of_it_is_refused(tmp_path: Path, link: str) -> None:
    """The run would remove checkpoints there, or append to that file."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for step in range(1, 5):
        (elsewhere / f"step_{step}.ckpt").write_text("mine")
    target = elsewhere if link in ("checkpoints", "samples") else elsewhere / "step_1.ckpt"
    (tmp_path / "run" / link).parent.mkdir(parents=True)
    (tmp_path / "run" / link).symlink_to(target)
    environment = {"command": "x", "started": "x", "lightning": "2"}
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment))
    for ckpt_path in ("auto", "null"):
        with pytest.raises(DataError, match=rf"run/{link} is a link out of its folder.*hydra\.run\.dir=FOLDER"):
            training(tmp_path / "run", f"ckpt_path={ckpt_path}")
    assert [path.read_text() for path in elsewhere.iterdir()] == ["mine"] * 4
    assert (tmp_path / "run" / link).is_symlink()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.write_bytes(b"caf\xe9")])
def test_a_config_that_is_no_config_is_of_no_run(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A pipe would be read for ever."""
    make(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"holds config\.yaml, and no environment\.json that a run of coca_lit wrote"):
        training(tmp_path)

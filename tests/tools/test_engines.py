"""Shards on the devices of this machine: what dies starts again, what fails is counted."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from coca_lit.data.shards.shard import read_manifest
from coca_lit.errors import ConfigError, DataError
from coca_lit.tools.engines import Machine, Work, engine_from
from coca_lit.tools.prepare.command import data as coca_data
from coca_lit.tools.prepare.scenes import write_shards
from helpers.forking import called
from helpers.shard_jobs import work_on


@pytest.mark.slow
def test_a_process_per_device_of_which_some_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """A device is one of those that the user made visible; a dead process costs its shard alone, and that only if it
    dies every time.
    """
    called(os.getpid)  # starts the server from which processes are forked with everything imported
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    work = Work(Machine([1, "cpu"]), "working")
    found = {name: rest for name, *rest in work(work_on, ["a", "once", "always", "broken", "bug", "b"], tmp_path)}
    assert found.keys() == {"a", "b", "once"}
    assert os.getpid() not in {process for process, _ in found.values()}
    assert {device for _, device in found.values()} <= {"7", ""}
    assert work.failed["always"].startswith("its process was killed 3 times")
    assert work.failed["broken"] == "no such caption"
    assert work.failed["bug"] == "ZeroDivisionError: division by zero"
    with pytest.raises(DataError, match=r"3 of 8.*failed"):
        work.close(8)
    said = capfd.readouterr().err
    assert "8 shards: 3 done, 2 skipped (finished before), 3 failed" in said
    assert "failed: broken: no such caption" in said


def test_in_this_process(tmp_path: Path) -> None:
    for engine in (Machine(), Machine(["cpu"])):
        assert [process for _, process, _ in Work(engine, "working")(work_on, "ab", tmp_path)] == [os.getpid()] * 2


@pytest.mark.slow
def test_one_process_on_the_cpu_sees_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for devices in (["cpu"], ["cpu", "cpu"]):
        ((_, process, seen),) = Work(Machine(devices), "working")(work_on, "a", tmp_path)
        assert process != os.getpid()
        assert seen == ""
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert [*Machine("cores").run([os.getpid])] == [(0, os.getpid())]  # data need no GPU


@pytest.mark.slow
def test_where_there_is_no_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert os.getpid() not in dict(Machine(["cpu", "cpu"]).run([os.getpid] * 2)).values()


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_waits_for_a_job_is_replaced() -> None:
    run = Machine(["cpu", "cpu"]).run([os.getpid] * 3)
    number, process = next(run)
    os.kill(process, signal.SIGKILL)
    time.sleep(2)  # until its pool knows
    found = dict(run)
    assert found.keys() == {0, 1, 2} - {number}
    assert found[2] != process


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("engine=gpu", "'engine' has no option 'gpu'; did you mean 'gpus'"),
        ("engine=gpus engine.device=[0]", "there is no key 'engine.device'; did you mean 'engine.devices'"),
        ("engine=gpus engine.devices=7", "engine.devices must be auto, cores, or a list of GPU numbers and cpu, got 7"),
        ("engine=gpus engine.devices=[-1]", "engine.devices must be auto, cores, or a list"),
    ],
)
def test_mistakes_are_one_sentence(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        engine_from(words.split())
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_shard_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """`coca-data check` reports it, writes no manifest, and the same command checks that shard alone."""
    from coca_lit.tools.prepare import check

    write_shards(tmp_path, 6, 16, per_shard=2)
    real, checked = check.check_shard, []

    def failing(path: Path, caption_key: str) -> check.ShardReport:
        checked.append(path.name)
        if path.name == "00001.tar" and len(checked) < 4:
            raise OSError("Input/output error")
        return real(path, caption_key)

    monkeypatch.setattr(check, "check_shard", failing)
    command = ["check", str(tmp_path), "engine=local", "engine.devices=[cpu]"]
    with pytest.raises(SystemExit, match=r"1 of 3.*failed"):
        coca_data(command)
    said = capsys.readouterr().err
    assert f"failed: {tmp_path}/00001.tar: Input/output error" in said
    assert "3 shards: 2 done, 0 skipped (finished before), 1 failed" in said
    assert read_manifest(tmp_path) == {}
    coca_data(command)
    assert "3 shards: 1 done, 2 skipped (finished before), 0 failed" in capsys.readouterr().err
    assert checked == ["00000.tar", "00001.tar", "00002.tar", "00001.tar"]
    assert len(read_manifest(tmp_path)) == 3

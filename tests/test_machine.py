"""Shares of a machine: control groups as files that look like theirs, a busy core as a real one."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from coca_lit import machine
from coca_lit.callbacks import SharedMachine
from coca_lit.callbacks.progress import SHARED_AFTER
from coca_lit.distributed import print_rank_zero
from coca_lit.machine import best_device, in_shell, is_first_process, memory_bytes, processors, set_up_environment
from helpers.running import ROOT

CORES = len(os.sched_getaffinity(0))
WHOLE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_commands_as_windows_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """At cmd.exe `&` and `|` would begin another command."""
    words = ["coca-caption", "C:\\R&D\\a", "x=a|b", "my photos/", "x=1"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        found = in_shell(words)
    assert found == 'coca-caption "C:\\R&D\\a" "x=a|b" "my photos/" x=1'


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))


QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"
V2, V1 = "0::/user.slice/app", "4:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n0::/"


@pytest.mark.slow
def test_output_goes_on_where_its_encoding_lacks_a_character() -> None:
    """As in a file that Windows writes as cp1252."""
    code = """
import sys
from coca_lit.runs.launch import started
from coca_lit.tools.caption.outputs import print_rows
for encoding, letter in (("cp1252", "\\u6771"), ("utf-8", "\\udce9")):  # the second: of a file name that is not Unicode
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)
    with started("test"):
        print(f"{letter} \\xb7", flush=True)
        print_rows([[f"{letter}.jpg", "a dog"]])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    cp1252, utf8 = done.stdout.splitlines()[:2], done.stdout.splitlines()[2:]
    assert [line.decode("cp1252") for line in cp1252] == ["\\u6771 ·", "\\u6771.jpg\ta dog"], done.stderr
    assert utf8 == [b"\xe9 \xc2\xb7", b"\xe9.jpg\ta dog"], done.stderr


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/", {"cpu.max": "200000 100000"}, 2),  # a container sees its own group as the root
        (V2, {"user.slice/app/cpu.max": "max 100000", "user.slice/cpu.max": "350000 100000"}, 3),
        (V2, {"user.slice/app/cpu.max": "50000 100000"}, 1),
        (V1, {f"cpu,cpuacct/docker/abc/{QUOTA}": "400000", f"cpu,cpuacct/docker/abc/{PERIOD}": "100000"}, 4),
        (V1, {f"cpu,cpuacct/{QUOTA}": "200000", f"cpu,cpuacct/{PERIOD}": "100000"}, 2),  # seen from within
        (V1, {f"cpu,cpuacct/{QUOTA}": "-1", f"cpu,cpuacct/{PERIOD}": "100000"}, 64),
        ("0::/../../other", {"cpu.max": "max 100000"}, 64),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, groups: str, files: dict[str, str], cores: int) -> None:
    write(tmp_path, {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert processors(tmp_path) == cores


LIMIT = "memory.limit_in_bytes"


@pytest.mark.parametrize(
    ("groups", "files", "found"),
    [
        ("0::/", {"memory.max": "3000000"}, 3_000_000),
        (V2, {"user.slice/app/memory.max": "max", "user.slice/memory.max": "5000000"}, 5_000_000),
        (V1, {f"memory/docker/abc/{LIMIT}": "4000000", f"memory/{LIMIT}": "9223372036854771712"}, 4_000_000),
        (V1, {f"memory/{LIMIT}": "9223372036854771712"}, None),
        (V1, {"cpu,cpuacct/memory.max": "1"}, None),
    ],
)
def test_limits_of_memory(tmp_path: Path, groups: str, files: dict[str, str], found: int | None) -> None:
    write(tmp_path, {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert memory_bytes(tmp_path) == (found or WHOLE)


def test_without_control_groups(tmp_path: Path) -> None:
    assert processors(tmp_path) == CORES
    assert memory_bytes(tmp_path) == WHOLE


CODE = """
import os
open('{group}/cgroup.procs', 'w').write(str(os.getpid()))
{rest}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("controller", "limits", "rest", "said"),
    [
        (
            "cpu",
            {"cpu.cfs_quota_us": "100000", "cpu.max": "100000 100000"},
            "from coca_lit.cli.runtime import configure_libraries\nconfigure_libraries(None)\n"
            "import torch\nprint(torch.get_num_threads())",
            "1",
        ),
        (
            "memory",
            {LIMIT: "536870912", "memory.max": "536870912"},
            "from coca_lit.machine import memory_bytes\nprint(memory_bytes())",
            "536870912",
        ),
    ],
)
def test_a_real_control_group(controller: str, limits: dict[str, str], rest: str, said: str) -> None:
    """A program in a group of its own with the time of one core, which PyTorch does not see, or with little memory."""
    first = Path("/sys/fs/cgroup", controller)
    group = (first if first.is_dir() else first.parent) / f"coca_lit_test_{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control groups of one's own here: {error}")
    try:
        found = [name for name in limits if (group / name).exists()]
        if not found:
            pytest.skip(f"no group limits this here: {controller}")
        (group / found[0]).write_text(limits[found[0]])
        code = CODE.format(group=group, rest=rest)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "4"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [said]
    finally:
        group.rmdir()


@pytest.mark.parametrize(
    ("there", "chosen"),
    [((), "cpu"), (("mps",), "mps"), (("cuda", "mps"), "cuda")],
)
def test_the_fastest_device_is_chosen(monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], chosen: str) -> None:
    for name, backend in {"cuda": torch.cuda, "mps": torch.backends.mps}.items():
        monkeypatch.setattr(backend, "is_available", lambda name=name: name in there)
    assert best_device() == chosen


@pytest.mark.parametrize(("system", "told"), [("darwin", "1"), ("linux", None)])
def test_operations_without_a_kernel_fall_back(monkeypatch: pytest.MonkeyPatch, system: str, told: str | None) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(os, "environ", {})
    set_up_environment()
    assert os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == told


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_waiting_threads_sleep_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spins: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    set_up_environment()
    found = os.environ.pop("GOMP_SPINCOUNT", None)
    assert found == spins


# Two threads on two cores, and another program that comes and goes: what the kernel and the clocks would say of it is
# made up, since the cores of a test are not its own. Threads, their cores and the products are real.
PROGRAM = """
import contextlib, hashlib, os, time, torch
from types import SimpleNamespace
from coca_lit import machine
cores, other = sorted(os.sched_getaffinity(0))[:2], [0.0]
os.sched_setaffinity(0, cores)
spent, looks = dict.fromkeys(cores, 0.0), [0]
def busy():
    looks[0] += 1  # a second in which each core of this process was busy for half of it
    on = machine.shared_cores.cache_info().currsize and machine.shared_cores()._used or cores
    for core in cores:
        spent[core] += 0.5 * (core in on) + other[0] * (core == cores[0])
    own[0] += 0.5 * len(on)
    return dict(spent)
own = [0.0]
machine._busy = busy
clocks = {"process_time": lambda: own[0], "monotonic": lambda: float(looks[0])}
machine.time = SimpleNamespace(sleep=lambda _: time.sleep(0.1), **clocks)
torch.set_num_threads(2)
torch.manual_seed(0)
x, results = torch.randn(500, 500), set()

def cores_of_threads():
    found = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            found.add(frozenset(os.sched_getaffinity(int(thread))))
    return found

def compute(until):
    began = time.monotonic()
    while not until() and time.monotonic() - began < 120:
        results.add(hashlib.sha1((x @ x).softmax(0).sum().numpy().tobytes()).hexdigest())

watch = machine.shared_cores()
compute(until=lambda: looks[0] > 3)
assert cores_of_threads() == {frozenset(cores)}
assert not watch.crowded
other[0] = 1.0
compute(until=lambda: watch.crowded and cores_of_threads() == {frozenset(cores[1:])})
assert cores_of_threads() == {frozenset(cores[1:])}, "the core without the other program"
if not (child := os.fork()):
    os._exit(sorted(os.sched_getaffinity(0)) != cores)
assert os.waitpid(child, 0)[1] == 0, "a child may use all"
other[0] = 0.0
compute(until=lambda: not watch.crowded and cores_of_threads() == {frozenset(cores)})
assert cores_of_threads() == {frozenset(cores)}
assert len(results) == 1
"""


@pytest.mark.slow
@pytest.mark.skipif(CORES < 2 or not Path("/proc/stat").exists(), reason="needs two cores of a Linux machine")
def test_threads_leave_a_core_that_another_program_uses() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True)


@pytest.mark.parametrize("counted", [{}, {10**6: 1.0}])
def test_a_container_that_counts_no_core_of_this_process_is_not_watched(
    monkeypatch: pytest.MonkeyPatch, counted: dict[int, float]
) -> None:
    monkeypatch.setattr(machine, "_busy", lambda: counted)
    assert machine.shared_cores.__wrapped__() is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc")
def test_the_kernel_counts_what_this_process_does() -> None:
    """Its cores are busy for at least as long as this process, whatever else runs."""
    busy, own = machine._busy(), time.process_time()
    while time.process_time() - own < 0.5:
        pass
    after = machine._busy()
    assert sum(after[core] - busy[core] for core in os.sched_getaffinity(0)) >= 0.45  # ticks of 10 ms
    assert set(after) >= os.sched_getaffinity(0)


@pytest.mark.parametrize(
    ("processes", "threads", "taken", "told"),
    [(1, 2, 0.1, ""), (1, 2, 0.9, "them, or start with threads=1"), (2, 1, 1.2, ""), (2, 1, 1.9, "them\n")],
)
def test_a_shared_machine_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    processes: int,
    threads: int,
    taken: float,
    told: str,
) -> None:
    """The cores of the training's other processes are not shared with others, and one thread cannot become fewer."""
    monkeypatch.setattr("coca_lit.callbacks.progress.shared_cores", lambda: SimpleNamespace(taken=taken, cores=[0, 1]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    callback, trainer = SharedMachine(), SimpleNamespace(is_global_zero=True, num_devices=processes)
    module, anything = SimpleNamespace(device=torch.device("cpu")), cast("Any", None)
    for step in range(2 * SHARED_AFTER):
        callback.on_train_batch_end(cast("Any", trainer), cast("Any", module), anything, anything, step)
    printed = capsys.readouterr().out
    assert printed.count("0.9 of 2") == bool(told)
    assert told in printed


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no such cores")
def test_cores_that_a_container_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: int, cores: Any) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "register_at_fork", lambda **_: None)
    watch = machine.SharedCores()
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    watch._pin([0])
    watch.crowded = True
    watch._in_child()


# Who is the first


SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("told", "first"),
    [
        ({}, True),
        (SRUN, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", **SRUN}, True),  # srun torchrun, which orders machines by their names
        ({"RANK": "2", "LOCAL_RANK": "0", "SLURM_PROCID": "0"}, False),
    ],
)
def test_one_process_is_the_first(
    told: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first
    print_rank_zero("once")
    assert capsys.readouterr().out == "once\n" * first

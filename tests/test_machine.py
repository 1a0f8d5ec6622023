"""Shares of a machine: control groups as files that look like theirs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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
from coca_lit.tools.commands import started
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

"""Python programs for the tests as processes of their own that need no time to import anything.

They are forked from a server that has imported what a training needs, once for each worker of pytest. That takes a
tenth of the time of `python FILE`; whatever is tested of the start of Python itself needs a real `subprocess`.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

TESTS = Path(__file__).resolve().parents[1]
os.fsync = lambda file: None  # for power cuts, which are not tested; a killed process leaves what it wrote
FORKSERVER = get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        *("coca_lit.cli.train", "coca_lit.lit_module", "coca_lit.callbacks", "coca_lit.tools.report"),
        *("coca_lit.data.datamodule", "coca_lit.evals.inference", "coca_lit.evals.captions", "matplotlib.pyplot"),
        "tests.helpers.warm_server",
    ]
)


def called(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a picklable function returns in a process of its own."""
    with ProcessPoolExecutor(1, FORKSERVER) as pool:
        return pool.submit(function, *arguments).result(timeout=600)


class Program:
    """`python FILE …` or `python -m MODULE …` in the folder `cwd` and exactly this environment.

    Args:
        ranks: as many processes as torchrun would start; None for a program without it.
    """

    def __init__(self, *command: str, cwd: Path, environment: Mapping[str, str], ranks: int | None = None) -> None:
        self.command, self.folder = command, TemporaryDirectory()
        self.outputs = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        told = (command, cwd, dict(environment), self.outputs, ranks)
        self.process = FORKSERVER.Process(target=_start, args=told)
        self.process.start()

    def said(self) -> str:
        """Standard output and standard error so far."""
        return "".join(path.read_text() for path in self.outputs if path.exists())

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.command, timeout, *(path.read_bytes() for path in self.outputs))
        with self.folder:
            said = [path.read_text() for path in self.outputs]
        return subprocess.CompletedProcess(self.command, self.process.exitcode, *said)


def _start(
    command: tuple[str, ...], cwd: Path, environment: dict[str, str], outputs: list[Path], ranks: int | None
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of workers, as usual; else they would start a fork server
    torch.set_num_threads(1)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [path for path in sys.path if not Path(path).is_relative_to(TESTS)]  # pytest's own
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if ranks is None:
        _run(*command)
    else:
        meeting = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=tests")
        settings, *_ = config_from_args(parse_args([*meeting, f"--nproc-per-node={ranks}", "none"]))
        settings.start_method = "fork"
        elastic_launch(settings, _run)(*command)


def _run(*command: str) -> None:
    is_module = command[0] == "-m"
    sys.path.insert(0, os.getcwd() if is_module else str(Path(command[0]).parent))
    sys.argv = [*command[is_module:]]
    if is_module:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")

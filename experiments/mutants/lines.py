"""Records which lines of the package each test runs, in the test's own process and in those that it starts.

`drawn.py record` uses it. Needs Python 3.12, whose `sys.monitoring` reports a line once and then costs nothing.

A process records where `LINES_FOLDER` names a folder and `sitecustomize` imports this module. It writes a file of its
own there: a line with the test, from `PYTEST_CURRENT_TEST`, and below it lines of the package, "coca_lit/files.py:12".
"""

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

FOLDER, PACKAGE = "LINES_FOLDER", "LINES_PACKAGE"  # variables of the environment
SECONDS = "seconds"  # the file with the time of each test
SITECUSTOMIZE = "import experiments.mutants.lines as lines\n\nlines.start()\n"
monitoring: Any = vars(sys)["monitoring"]  # the types are checked for Python 3.11, which has none
TOOL = 4  # of the numbers that sys.monitoring has, one that it gives no name


class _Recorder:
    def __init__(self, folder: str, package: str) -> None:
        self.folder, self.package = folder, package
        self.file: int | None = None
        self.test = ""

    def on_start(self, code: CodeType, offset: int) -> Any:
        if code.co_filename.startswith(f"{self.package}/"):
            monitoring.set_local_events(TOOL, code, monitoring.events.LINE)
        return monitoring.DISABLE

    def on_line(self, code: CodeType, line: int) -> Any:
        if self.file is None:
            name = f"{self.folder}/{os.getpid()}_{os.urandom(4).hex()}"  # numbers of processes are used again
            self.file = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            self.test = ""
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        if test != self.test:
            self.test = test
            os.write(self.file, f"{test}\n".encode())
        path = code.co_filename.removeprefix(os.path.dirname(self.package) + "/")
        os.write(self.file, f"{path}:{line}\n".encode())  # at once: a test may end this process by SIGKILL
        return monitoring.DISABLE

    def after_fork(self) -> None:
        self.file = None
        monitoring.restart_events()


def start() -> None:
    """Records from now on, in this process and its forks, where the environment asks for it."""
    folder, package = os.environ.get(FOLDER), os.environ.get(PACKAGE)
    if not folder or not package:
        return
    recorder = _Recorder(folder, package)
    events = monitoring.events
    monitoring.use_tool_id(TOOL, __name__)
    monitoring.register_callback(TOOL, events.PY_START, recorder.on_start)
    monitoring.register_callback(TOOL, events.LINE, recorder.on_line)
    monitoring.set_events(TOOL, events.PY_START)
    os.register_at_fork(after_in_child=recorder.after_fork)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None]:
    monitoring.restart_events()
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    monitoring.restart_events()
    yield


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed and "PYTEST_XDIST_WORKER" in os.environ:
        with Path(os.environ[FOLDER], SECONDS).open("a") as file:
            file.write(f"{report.duration:.3f} {report.nodeid}\n")


def seconds(folder: Path) -> dict[str, float]:
    """The time of each test that passed."""
    lines = (line.partition(" ") for line in (folder / SECONDS).read_text().splitlines())
    return {test: float(duration) for duration, _, test in lines}


def recorded(folder: Path) -> Iterator[tuple[str, str]]:
    """(test, line) pairs, as "models/test_coca.py::test_shapes" and "coca_lit/models/coca.py:12".

    What the preparation of a test runs also counts for the other tests of its file, for which it may have been the
    preparation, too: their tests are "models/test_coca.py".
    """
    for path in folder.iterdir():
        if path.name == SECONDS:
            continue
        test = ""
        for text in path.read_text().splitlines():
            if not text.startswith("coca_lit/"):
                name, _, phase = text.rpartition(" ")
                test = name.partition("::")[0] if phase == "(setup)" else name
            elif test:
                yield test, text

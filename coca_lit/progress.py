"""Progress of a command, on standard error because standard output is for results."""

import multiprocessing
import sys
import time
from contextlib import AbstractContextManager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from coca_lit.distributed import rank

LINE_INTERVAL = 10  # seconds


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """A bar in a terminal from the first `advance` on, else a line every few seconds; on rank 0 only, and not in a
    process of `multiprocessing`, whose parent has a bar. Messages are printed by every process.

    Args:
        what: the activity, such as "captioning".
        things: what is counted.
    """

    def __init__(self, what: str, things: str = "images") -> None:
        self.what = what
        self.things = things
        self.count = 0
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._start = self._last = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._silent = rank() > 0 or multiprocessing.parent_process() is not None
        shown = sys.stderr.isatty() and not self._silent
        self._bar = Progress(*columns, console=self._console) if shown else None
        self._task = self._bar.add_task(what, total=1.0) if self._bar else None

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int, share: float) -> None:
        """Counts further things; `share` of all work is done now."""
        self.count += count
        seconds = time.monotonic() - self._start
        text = f"{self.what} · {self.count} {self.things} · {self.count / max(seconds, 1e-9):.1f}/s"
        if self._bar and self._task is not None:
            self._bar.start()
            self._bar.update(self._task, completed=share, description=text)
        elif not self._silent and time.monotonic() - self._last > LINE_INTERVAL:
            self._last = time.monotonic()
            left = timedelta(seconds=round(seconds * (1 - share) / max(share, 1e-9)))
            self.print(f"{text} · {share:.0%} · ETA {left}")

    def reach(self, count: int, total: int) -> None:
        """Sets the count to `count` of `total`."""
        self.advance(count - self.count, count / total)

    def print(self, message: str) -> None:
        """A line, above the bar if there is one."""
        self._console.print(message)

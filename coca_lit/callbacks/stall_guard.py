"""Says when training stands still: where, and after which samples. Ends the run if it is asked to.

A data worker that hangs on a disk, or a rank that is stopped, makes no error: everybody waits, for hours. A thread of
each process looks at the clock. The processes of a run tell each other how far they are by small files in the run
folder, because collectives are what they hang in.
"""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L

from coca_lit.callbacks.find import callbacks_of
from coca_lit.distributed import rank, world_size
from coca_lit.errors import DataError, TrainingError
from coca_lit.reading import read_json

log = logging.getLogger(__name__)

FOLDER = ".ranks"  # in the run folder, while there are several processes
LOOKS = 5  # within the time after which a stall is reported
STATES = {"T": "is stopped", "t": "is stopped", "D": "waits for a disk", "Z": "has ended"}  # of Linux, in /proc
STEP, DATA, VALIDATION = "step", "data", "validation"


class StallGuard(L.Callback):
    """Watches training steps and validation, not scores and checkpoints, which may take their time.

    Args:
        output_dir: the run folder.
        minutes: without progress after which a stall is reported, once; None for never.
        end_minutes: without progress after which the run ends with exit code 1; None for never. A single process that
            waits for its data saves first.
    """

    def __init__(self, output_dir: str | Path, minutes: float | None = 10.0, end_minutes: float | None = None) -> None:
        for name, value in (("minutes", minutes), ("end_minutes", end_minutes)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, or null for never, got {value}")
        self.folder = Path(output_dir) / FOLDER
        self.seconds, self.end_seconds = (None if m is None else 60 * m for m in (minutes, end_minutes))
        self._over = threading.Event()
        self._doing: str | None = None  # nothing that is watched
        self._since = 0.0
        self._step = 0
        self._keys: Sequence[str] = ()  # of the batch of this step, or of the last one
        self._last_keys: deque[str] = deque(maxlen=1)  # of the last batch of each data worker, the next one's first
        self._said = False
        self._ending = ""  # why the run is to end
        self._raised = False
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}  # rank -> what it wrote last, and since when
        self._launcher: Any = None
        self._handler: Any = None

    # What happens

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        limits = [limit for limit in (self.seconds, self.end_seconds) if limit is not None]
        if not limits:
            return
        self._launcher = trainer.strategy.launcher
        workers = getattr(getattr(trainer, "datamodule", None), "num_workers", 0)
        self._last_keys = deque(maxlen=max(workers, 1))
        self._over.clear()
        self._now(DATA, trainer.global_step)
        if self._can_interrupt():
            self._handler = signal.signal(signal.SIGALRM, self._interrupt)
        threading.Thread(target=self._watch, args=(min(limits) / LOOKS,), name="stalls", daemon=True).start()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_keys.clear()  # new workers
        self._now(DATA, trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._keys = list(getattr(batch, "keys", ()))
        if self._keys and len(batch.images):  # texts come from no worker
            self._last_keys.append(self._keys[-1])
        self._now(STEP, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._now(DATA, trainer.global_step)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._now(VALIDATION, trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._now(DATA, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def _now(self, doing: str | None, step: int) -> None:
        self._doing, self._step, self._since, self._said = doing, step, time.monotonic(), False

    def _stop(self) -> None:
        self._over.set()
        self._doing = None
        if self._handler is not None:
            signal.signal(signal.SIGALRM, self._handler)
            self._handler = None
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in the block may take its time."""
        doing, self._doing = self._doing, None
        try:
            yield
        finally:
            self._now(doing, self._step)

    # Who looks

    def _watch(self, interval: float) -> None:
        while not self._over.wait(interval):
            self._look()

    def _look(self) -> None:
        if world_size() > 1:
            self._tell()
        doing, seconds = self._doing, time.monotonic() - self._since
        if doing is None:
            return
        silent = self._silent() if world_size() > 1 else {}
        late = self.seconds is not None and seconds > self.seconds
        ends = self.end_seconds is not None and seconds > self.end_seconds
        # Each process speaks of its own data, and the first one that is not silent of all others.
        speaks = doing == DATA or rank() == min(set(range(world_size())) - silent.keys())
        if late and not self._said and speaks:
            log.warning("%s", self._sentence(doing, seconds, silent))
            self._said = True
        if ends:
            self._end(self._sentence(doing, seconds, silent))

    def _sentence(self, doing: str, seconds: float, silent: dict[int, dict[str, Any]]) -> str:
        own = f"rank {rank()}" if world_size() > 1 else "the run"
        time_ = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
        if silent:
            others = "; ".join(
                f"rank {number} (process {heard.get('process')} on {heard.get('host')}), silent since step "
                f"{heard.get('step')}, samples {_short(heard.get('samples', ()))}"
                for number, heard in silent.items()
            )
            return f"no progress for {time_}, {own} is at step {self._step} and waits for {others}"
        if doing != DATA:
            return f"{own} has been in the {doing} at step {self._step} for {time_}; samples: {_short(self._keys)}"
        full = len(self._last_keys) == self._last_keys.maxlen
        worker = (
            f"the worker that is awaited read last: {self._last_keys[0]}" if full else "its worker read nothing yet"
        )
        states = _worker_states()
        return (
            f"{own} has waited for data for {time_} after step {self._step}; {worker}"
            f"{'; ' if states else ''}{', '.join(states)}"
        )

    # Several processes

    def _tell(self) -> None:
        note = {"process": os.getpid(), "host": socket.gethostname(), "step": self._step, "samples": list(self._keys)}
        with suppress(OSError):  # a full disk is no stall
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"rank{rank()}.json").write_text(json.dumps(note | {"clock": time.monotonic()}))

    def _silent(self) -> dict[int, dict[str, Any]]:
        """The ranks that wrote nothing new for a while, with what they wrote last."""
        now, limit = time.monotonic(), (self.seconds or self.end_seconds or 0) * 3 / LOOKS
        silent = {}
        for number in range(world_size()):
            try:
                note = read_json(self.folder / f"rank{number}.json", dict)
            except DataError:
                continue
            if number not in self._heard or self._heard[number][0] != note:
                self._heard[number] = note, now
            elif now - self._heard[number][1] > limit and number != rank():
                silent[number] = note
        return silent

    # The end

    def _can_interrupt(self) -> bool:
        """Whether the main thread can be told by a signal: then it saves. Ranks do not save when others fail."""
        main = threading.current_thread() is threading.main_thread()
        return self.end_seconds is not None and main and world_size() == 1 and hasattr(signal, "SIGALRM")

    def _end(self, sentence: str) -> None:
        self._ending = f"{sentence}; the run ends, and the same command resumes it"
        if self._handler is not None:
            os.kill(os.getpid(), signal.SIGALRM)
            if self._over.wait(5) or self._raised:
                return
        log.error("%s", self._ending)
        for process in [*multiprocessing.active_children(), *getattr(self._launcher, "procs", ())]:
            process.kill()
        os._exit(1)  # the main thread is in code that no exception reaches

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._ending and not self._raised:
            self._raised = True
            raise TrainingError(self._ending)


@contextmanager
def unwatched(trainer: L.Trainer) -> Iterator[None]:
    """For what may take its time between two steps, such as scores."""
    with ExitStack() as stack:
        for guard in callbacks_of(trainer, StallGuard):
            stack.enter_context(guard.paused())
        yield


def _worker_states() -> list[str]:
    """What is wrong with the data workers of this process, as far as the system tells."""
    states = []
    for process in multiprocessing.active_children():
        with suppress(OSError, IndexError):
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in STATES:
                states.append(f"worker process {process.pid} {STATES[state]}")
    return states


def _short(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") if keys else "none"

"""Progress of a run: a bar on a terminal, a plain line every N steps in a pipe or a log file; its speed and the samples
it has seen.
"""

import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from coca_lit.data.batch import Batch
from coca_lit.data.loader import TrainLoader
from coca_lit.distributed import gather_objects, totals_over_ranks, world_size
from coca_lit.runs.run_folder import add_to_environment
from coca_lit.training.lightning_fixes import callbacks_of, logged_step_ended

MAX_WAIT = 0.05  # share of a training that may be spent waiting for data before there is advice
SHOWN = 5  # numbers in the bar
RECENT = 5  # lines from which the time left is estimated, as other programs come and go


class RunSummary(L.Callback):
    """Prints what is about to be trained, on what, for how long, and which scores will be computed. Commits of the data
    sets on the Hub are also recorded in the run folder.

    Args:
        output_dir: the run folder.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = output_dir

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        sizes = [(p.numel(), p.requires_grad) for p in pl_module.parameters()]
        every, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
        processes = f"{world_size()} processes" if world_size() > 1 else "1 process"
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        evals = [evaluation for callback in callbacks for evaluation in getattr(callback, "evals", ())]
        data = trainer.datamodule  # type: ignore[attr-defined]
        steps, first = int(trainer.estimated_stepping_batches), trainer.global_step
        lines = {
            "model": f"{type(getattr(pl_module, 'net', pl_module)).__name__}, {every / 1e6:.1f} M parameters, "
            f"{trained / 1e6:.1f} M trained",
            "device": f"{pl_module.device}, {processes}, precision {trainer.precision}",
            "data": f"{type(data).__name__}, {trainer.num_training_batches:,} batches an epoch"
            + (f" of {data.batch_size:,}" if hasattr(data, "batch_size") else ""),
            "steps": f"{steps:,}" + (f", {first:,} of them done" if first else ""),
            "scores": ", ".join(f"{e.name} ({type(e).__name__})" for e in evals) or "none",
            "folder": self.output_dir,
        }
        if commits := getattr(data, "commits", {}):  # of data sets on the Hub
            lines["commits"] = ", ".join(f"{name} is {commit[:10]}" for name, commit in commits.items())
            add_to_environment(Path(self.output_dir), {"data_commits": commits})
        print("\n".join(f"{name:8}{value}" for name, value in lines.items()), flush=True)


def progress_bar() -> ProgressBar:
    """The bar that suits standard output."""
    return TerminalProgress() if sys.stdout.isatty() else PlainProgress()


class PlainProgress(ProgressBar):
    """step 200/1500 · epoch 2 · ETA 0:01:12 · train/caption_loss 0.412 · samples/s 812"""

    def __init__(self) -> None:
        super().__init__()
        self._seen: deque[tuple[float, int]] = deque(maxlen=RECENT)  # times and steps of the newest lines
        self._begins = True

    def disable(self) -> None:
        """Lightning calls this on all ranks but the first, which print nothing anyway."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen.clear()
        self._seen.append((time.monotonic(), trainer.global_step))
        self._begins = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, total, now = trainer.global_step, int(trainer.estimated_stepping_batches), time.monotonic()
        began, first = self._seen[0]
        left = timedelta(seconds=round((now - began) / max(step - first, 1) * (total - step)))
        if trainer.is_global_zero:
            metrics = None
            if logged_step_ended(trainer) or step == total:
                self._seen.append((now, step))
                logged = self.get_metrics(trainer, pl_module).items()
                metrics = {name: x for name, x in logged if name != "v_num" and not name.startswith("val/")}
            self.show(trainer, total, left, metrics)
        if self._begins and step > first:  # the first step waits for workers and sets kernels up: it says nothing
            self._begins = False
            self._seen.clear()
            self._seen.append((now, step))

    def show(self, trainer: L.Trainer, total: int, left: timedelta, metrics: dict[str, Any] | None) -> None:
        """Called after every step, of `total`; with the metrics of a step that is logged, else with None."""
        if metrics is None:
            return
        parts = [f"step {trainer.global_step}/{total}", f"epoch {trainer.current_epoch + 1}", f"ETA {left}"]
        parts += [f"{name} {value:.4g}" for name, value in metrics.items()]
        print(" · ".join(parts), flush=True)


class TerminalProgress(PlainProgress):
    """One bar for the whole run in a line, with the time that is left of it and the newest numbers.

    Args:
        console: where it is; None for standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        numbers = TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
        bar = BarColumn(None, table_column=Column(ratio=1))
        self._bar = Progress(
            *(TextColumn("{task.description}"), bar, TextColumn("{task.fields[left]}"), numbers),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, left="", numbers="")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            self._bar.start()

    def show(self, trainer: L.Trainer, total: int, left: timedelta, metrics: dict[str, Any] | None) -> None:
        if metrics:
            names = {name: name.removeprefix("train/").removesuffix("_loss") for name in metrics}
            numbers = [f"{names[name]} {value:.3g}" for name, value in metrics.items()]
            self._bar.update(self._task, numbers="  ".join(numbers[:SHOWN]))
        step = trainer.global_step
        self._bar.update(self._task, completed=step, total=total, description=f"{step}/{total}", left=f"{left} left")

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Makes room for other bars, such as the bar of an evaluation."""
        shown = self._bar.live.is_started
        self._bar.live.transient = True
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.live.transient = False
            if shown:
                self._bar.start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._bar.stop()


class Throughput(L.Callback):
    """Logs samples per second over all ranks, and `train/data_wait`, the share of the time that the first process
    waited for its loader, both between two logged steps. If it waited for more than `MAX_WAIT` of the whole training,
    the last line says so and what to do.

    A wait does not count while a GPU still computes the step before: only an idle GPU is a loss. The wait for the first
    batch of the process, for which workers start, does not count either. Validation and scores are no part of the time.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._samples = 0
        self._waited = 0.0  # seconds
        self._first_at: float | None = None  # when this process got its first batch; None if its loader times nothing
        self._waited_in_all = 0.0
        self._computed: torch.cuda.Event | None = None  # at the end of the newest step
        self._validation_at = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart()  # a run that resumes within an epoch has no start of it

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if not isinstance(loader := trainer.train_dataloader, TrainLoader):
            return
        if self._first_at is None:
            self._first_at = time.monotonic()
        elif self._computed is None or self._computed.query():
            self._waited += loader.waited
            self._waited_in_all += loader.waited

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._samples += _samples(batch) * world_size()
        if pl_module.device.type == "cuda":
            self._computed = torch.cuda.Event()
            self._computed.record()
        if logged_step_ended(trainer):
            seconds = time.monotonic() - self._since
            pl_module.log("samples/s", self._samples / seconds, prog_bar=True)
            if self._first_at is not None:
                pl_module.log("train/data_wait", self._waited / seconds)
            self._restart()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_at = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.leave_out(time.monotonic() - self._validation_at)

    def leave_out(self, seconds: float) -> None:
        """Takes seconds that were no training from the time."""
        self._since += seconds
        if self._first_at is not None:
            self._first_at += seconds

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self._first_at is not None:
            share = self._waited_in_all / (time.monotonic() - self._first_at)
            if share > MAX_WAIT:
                print(
                    f"training waited for data {share:.0%} of the time (train/data_wait): raise data.num_workers up to "
                    "the number of CPU cores, or store smaller images, such as shards resized to 256 pixels",
                    flush=True,
                )

    def _restart(self) -> None:
        self._since, self._samples, self._waited = time.monotonic(), 0, 0.0


@contextmanager
def not_timed(trainer: L.Trainer) -> Iterator[None]:
    """For what happens during training and is none, such as scores."""
    began = time.monotonic()
    try:
        with ExitStack() as stack:
            for bar in callbacks_of(trainer, TerminalProgress):
                stack.enter_context(bar.hidden())
            yield
    finally:
        for throughput in callbacks_of(trainer, Throughput):
            throughput.leave_out(time.monotonic() - began)


class SamplesSeen(L.Callback):
    """Counts the samples and the tokens (start and end included, padding not) that all ranks have trained on."""

    def __init__(self) -> None:
        self._before = {"samples": 0, "tokens": 0}  # by earlier processes of the run
        self._samples = self._tokens = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._samples += _samples(batch)
        self._tokens += int(batch.lengths.sum())

    def total(self) -> dict[str, int]:
        """`{"samples": …, "tokens": …}` of the whole run. All ranks must call it."""
        here = totals_over_ranks([self._samples, self._tokens])
        return {name: before + n for (name, before), n in zip(self._before.items(), here, strict=True)}

    def state_dict(self) -> dict[str, int]:
        return self.total()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._before = dict(state_dict)


class SourceCounts(L.Callback):
    """Logs how many samples of each source of a mixture all ranks have trained on, as `samples/NAME`, earlier processes
    of the run included.
    """

    def __init__(self) -> None:
        self._before: Counter[str] = Counter()  # by earlier processes of the run
        self._own: Counter[str] = Counter()  # by this rank

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._own.update(batch.extras.get("source", ()))
        if (self._own or self._before) and logged_step_ended(trainer):  # it may begin with batches without any
            pl_module.log_dict({f"samples/{name}": float(count) for name, count in self.total().items()})

    def total(self) -> dict[str, int]:
        """Samples of the whole run by source. All ranks must call it."""
        if not self._own:  # then no rank has any: every batch of a mixture names its sources, and no other batch does
            return dict(self._before)
        return dict(sum(gather_objects(self._own), self._before))

    def state_dict(self) -> dict[str, int]:
        return self.total()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._before = Counter(state_dict)


def _samples(batch: Batch) -> int:
    """Number of its samples, each with one or several images; a batch without images has none."""
    return len(batch.keys) if len(batch.images) else 0


def samples_seen(trainer: L.Trainer) -> dict[str, int]:
    """The counts of the trainer's `SamplesSeen`; empty if it has none. All ranks must call it."""
    return next((seen.total() for seen in callbacks_of(trainer, SamplesSeen)), {})

"""The samples that a run skipped, by name, in its run folder."""

import csv
import logging
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from coca_lit.data.bad_samples import BadSample
from coca_lit.data.batch import Batch
from coca_lit.distributed import rank
from coca_lit.errors import DataError
from coca_lit.files import Waiting, append_lines, atomic_write, csv_line, whole_lines

log = logging.getLogger(__name__)

NAME = "bad_samples"
MAX_LINES = 100_000  # per process: a file to read, not a second data set


class BadSampleLog(L.Callback):
    """Appends each bad sample to `bad_samples/rank0.csv` (a file per process) when it is first seen, and counts them by
    shard in `bad_samples/shards.csv` when training ends or fails.

    A sample is listed once, however often it comes up, also by a run that resumes in the same folder.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.folder = Path(output_dir) / NAME
        self._known: set[BadSample] = set()
        self._waiting: Waiting[str] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._known = read_bad_samples(self.folder)
        path = self.folder / f"rank{rank()}.csv"
        self._waiting = Waiting(path, partial(append_lines, path))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        new = [found for found in dict.fromkeys(batch.bad) if found not in self._known]
        if new and len(self._known) < MAX_LINES:
            self._known.update(new)
            assert self._waiting is not None
            self._waiting.add(*map(csv_line, new))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._waiting is not None:
            self._waiting.flush()
        if rank() == 0 and (found := read_bad_samples(self.folder)):
            self._count_by_shard(found)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _count_by_shard(self, found: set[BadSample]) -> None:
        counts = Counter((sample.shard, sample.reason) for sample in found)
        rows = [(shard, reason, count) for (shard, reason), count in sorted(counts.items())]
        lines = map(csv_line, [("shard", "reason", "samples"), *rows])
        try:
            atomic_write(self.folder / "shards.csv", "".join(f"{line}\n" for line in lines).encode())
        except DataError as error:
            log.warning("%s", error)
        log.warning(
            "left out %d bad samples of %d shards, listed in %s",
            len(found),
            len({sample.shard for sample in found}),
            self.folder,
        )


def read_bad_samples(folder: Path) -> set[BadSample]:
    """What all processes have listed in the folder; a line that a crash cut off is ignored."""
    found: set[BadSample] = set()
    for path in folder.glob("rank*.csv"):
        for line in whole_lines(path):
            with suppress(csv.Error):  # a damaged line
                row = next(csv.reader([line]), [])
                if len(row) == len(BadSample._fields):
                    found.add(BadSample(*row))
    return found

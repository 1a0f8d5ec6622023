"""The checkpoint with the best score so far: `best.ckpt`, a link, and `best.json`, its score."""

import logging
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from coca_lit.errors import DataError
from coca_lit.files import atomic_link, write_json
from coca_lit.metrics import lower_is_better
from coca_lit.reading import read_json

log = logging.getLogger(__name__)

BEST = "best.ckpt"
BEST_SCORE = "best.json"
EARLIER_BEST = "earlier_best.ckpt"  # by another score, or by one of other images


class BestRecord(NamedTuple):
    """The score of the best checkpoint, and the step that it was saved after."""

    value: float
    step: int


class BestCheckpoint:
    """Keeps the best checkpoint of a folder by a score. Rank 0 alone writes.

    Args:
        folder: of the checkpoints.
        score: by which checkpoints are compared, e.g. `mscoco/CIDEr`.

    Attributes:
        of: what the score is computed of; scores of something else are not compared.
    """

    def __init__(self, folder: Path, score: str) -> None:
        self.folder = folder
        self.score = score
        self.of: dict[str, Any] = {}

    def record(self) -> BestRecord | None:
        """The best so far by this score; None if there is none, or if its checkpoint is gone."""
        if not (self.folder / BEST).exists():
            return None
        try:
            content = read_json(self.folder / BEST_SCORE, dict)
            record = BestRecord(float(content["value"]), int(content["step"]))
        except (DataError, ValueError, KeyError, TypeError, OverflowError):  # whatever a crash has left there
            return None
        comparable = content.get("score") == self.score and content.get("of") == self.of
        return record if comparable and (self.folder / f"step_{record.step}.ckpt").exists() else None

    def is_better(self, value: float) -> bool:
        """Whether a score is better than the best so far, which may be undefined (NaN)."""
        if math.isnan(value):
            return False
        record = self.record()
        if record is None or math.isnan(record.value):
            return True
        return value < record.value if lower_is_better(self.score) else value > record.value

    def keep_if_better(self, path: Path, step: int, value: float) -> None:
        """Makes this checkpoint the best one if it is better. A full disk costs the link, not the training."""
        if not self.is_better(value):
            return
        try:
            if self.record() is None and (self.folder / BEST).exists():  # by a score that does not compare
                os.replace(self.folder / BEST, self.folder / EARLIER_BEST)
            atomic_link(self.folder / BEST, path)
            content = {"score": self.score, "value": value, "step": step, "of": self.of}
            write_json(self.folder / BEST_SCORE, content)
        except (DataError, OSError) as error:
            log.warning("%s; training continues without this best checkpoint", error)

    def forget_after(self, step: int) -> None:
        """Forgets a best checkpoint that was moved away, or belongs to a step after this one, which is made again."""
        record = self.record()
        if not (self.folder / BEST).exists() or (record is not None and record.step > step):
            (self.folder / BEST).unlink(missing_ok=True)
            (self.folder / BEST_SCORE).unlink(missing_ok=True)

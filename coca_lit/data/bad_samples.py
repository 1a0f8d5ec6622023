"""Counting broken samples: a few are normal on the web, many mean that something else is wrong and stop the run."""

import logging
from collections import Counter

from coca_lit.data.records import DataError

log = logging.getLogger(__name__)

MIN_SEEN = 200  # before that many samples a fraction says little


class BadSamples:
    """One worker's count per reason and per shard; `seen` counts good samples too.

    Raises `DataError` as soon as more than `max_fraction` of at least `MIN_SEEN` samples were bad, or at the end of a
    pass over the worker's shards. In a DataLoader worker the error ends the training with the same message.
    """

    def __init__(self, max_fraction: float):
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be between 0 and 1, not {max_fraction}")
        self.max_fraction = max_fraction
        self.seen = 0
        self.reasons: Counter[str] = Counter()
        self.shards: Counter[str] = Counter()

    def add(self, reason: str, shard: str) -> None:
        self.reasons[reason] += 1
        self.shards[shard] += 1
        if (bad := self.reasons.total()) & (bad - 1) == 0:  # 1, 2, 4, 8, ...: early, and not too often
            log.warning("skipped %s", self.summary())
        if self.seen >= MIN_SEEN:
            self._judge()

    def end_of_pass(self) -> None:
        """Judge whatever was seen; also raises when not one sample was good, which would go on for ever."""
        if self.seen == self.reasons.total():
            raise DataError(f"the shards hold no usable sample: {self.summary()}")
        self._judge()

    def summary(self) -> str:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common())
        shards = ", ".join(f"{name} ({count})" for name, count in self.shards.most_common(5))
        details = f" ({reasons}; most in {shards})" if reasons else ""
        return f"{self.reasons.total()} of {self.seen} samples{details}"

    def _judge(self) -> None:
        if self.reasons.total() > self.max_fraction * self.seen:
            raise DataError(f"too many bad samples, more than max_bad_fraction={self.max_fraction}: {self.summary()}")

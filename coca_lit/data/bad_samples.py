"""Counting broken samples: a few are normal on the web, many mean that something else is wrong and stop the run."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from coca_lit.errors import DataError

log = logging.getLogger(__name__)

MIN_SEEN = 200  # before that many samples a fraction says little


class BadSample(NamedTuple):
    """One sample that was left out, or a shard that broke off there."""

    shard: str  # empty where the data are no shards
    key: str  # empty where the shard breaks off
    reason: str
    detail: str = ""


class BadSampleError(Exception):
    """There is no example to be made of a sample; another one stands in."""

    def __init__(self, sample: BadSample) -> None:
        super().__init__(sample)
        self.sample = sample


class BadSamples:
    """One worker's count per reason and per shard; `seen` counts good samples too.

    Raises `DataError` as soon as more than `max_fraction` of at least `MIN_SEEN` samples were bad, or at the end of a
    pass over the worker's shards; if none may be bad at the first one, before anything is trained in its place. In a
    DataLoader worker the error ends the training with the same message.
    """

    def __init__(self, max_fraction: float):
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be between 0 and 1, not {max_fraction}")
        self.max_fraction = max_fraction
        self.seen = 0
        self.reasons: Counter[str] = Counter()
        self.shards: Counter[str] = Counter()
        self.found: list[BadSample] = []
        self._good = 0  # at the end of the last pass
        self._whole_shards: list[int] = []  # samples in each

    def add(self, reason: str, shard: str, key: str = "", detail: str = "", count: int = 1) -> None:
        before = self.reasons.total()
        self.reasons[reason] += count
        self.shards[shard] += count
        self.found.append(BadSample(shard, key, reason, detail))
        if before.bit_length() < self.reasons.total().bit_length():  # 1, 2, 4, 8, ...: early, and not too often
            log.warning("skipped %s", self.summary())
        if self.seen >= MIN_SEEN or not self.max_fraction:
            self._judge()

    def catch(self, error: BadSampleError) -> None:
        shard, key, reason, detail = error.sample
        self.add(reason, shard, key, detail)

    def end_of_shard(self, samples: int) -> None:
        self._whole_shards.append(samples)

    def lose(self, reason: str, shard: str, samples: int | None, detail: str = "") -> None:
        """The rest of a shard is lost: `samples` of them, or if that is unknown, as many as shards had on average."""
        if samples is None:
            samples = sum(self._whole_shards) // len(self._whole_shards) if self._whole_shards else 1
        self.seen += max(samples, 1)
        self.add(reason, shard, detail=detail, count=max(samples, 1))

    def end_of_pass(self) -> None:
        """Judge whatever was seen; also raises when not one sample was good, which would go on for ever."""
        good = self.seen - self.reasons.total()
        if good == self._good:
            raise DataError(f"the shards hold no usable sample: {self.summary()}")
        self._good = good
        self._judge()

    def take(self) -> tuple[BadSample, ...]:
        """What was found since the last call."""
        found, self.found = self.found, []
        return tuple(found)

    def summary(self) -> str:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common())
        shards = ", ".join(f"{name} ({count})" for name, count in self.shards.most_common(5) if name)
        details = f" ({reasons}{'; most in ' if shards else ''}{shards})" if reasons else ""
        return f"{self.reasons.total()} of {self.seen} samples{details}"

    def _judge(self) -> None:
        if self.reasons.total() > self.max_fraction * self.seen:
            raise DataError(
                f"too many bad samples, more than max_bad_fraction={self.max_fraction} allows: {self.summary()}"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of single samples within the block, for whoever reports them all afterwards."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)

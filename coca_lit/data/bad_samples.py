"""Counting broken samples: a few are normal on the web, many stop the run, as something else must be wrong."""

import logging
from collections import Counter
from typing import NamedTuple

from coca_lit.errors import DataError
from coca_lit.reading import printable

log = logging.getLogger(__name__)

MIN_SEEN = 200  # samples before their fraction is judged
MIN_SHARDS = 20  # the same of shards


class BadSample(NamedTuple):
    """A sample that was skipped, or a shard that is truncated."""

    shard: str  # empty if the data are no shards
    key: str  # empty if it is the shard that is broken
    reason: str
    detail: str = ""


class BadSampleError(Exception):
    """A sample cannot be used and is to be replaced."""

    def __init__(self, sample: BadSample) -> None:
        super().__init__(sample)
        self.sample = sample


class LostShardError(BadSampleError):
    """None of the samples of a shard can be used."""


class BadSamples:
    """One worker's count per reason and per shard; `seen` counts good samples too.

    Raises `DataError` when more than `max_fraction` of the samples are bad, or of the shards torn or empty: as soon as
    `MIN_SEEN` samples or `MIN_SHARDS` shards have been seen, once all shards are indexed, and with
    `max_fraction=0` at the first one, before a replacement is trained on. Shards are judged as well because nobody
    knows how many samples a torn one held. In a DataLoader worker the error ends the training with the same message.

    Args:
        quiet: without warnings, for commands that report all of them afterwards.
    """

    def __init__(self, max_fraction: float, quiet: bool = False):
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be between 0 and 1, not {max_fraction}")
        self.max_fraction = max_fraction
        self.quiet = quiet
        self.seen = 0
        self.reasons: Counter[str] = Counter()
        self.shards: Counter[str] = Counter()
        self.found: list[BadSample] = []
        self._whole_shards = self._torn_shards = 0
        self._whole_samples = 0  # in the whole shards

    def add(self, reason: str, shard: str, key: str = "", detail: str = "", count: int = 1) -> None:
        shard, key, detail = map(printable, (shard, key, detail))
        before = self.reasons.total()
        self.reasons[reason] += count
        self.shards[shard] += count
        self.found.append(BadSample(shard, key, reason, detail))
        told = before.bit_length() < self.reasons.total().bit_length()  # 1, 2, 4, 8, ...: early, and not too often
        if told and not self.quiet:
            log.warning("skipped %s", self.summary())
        self._judge(MIN_SEEN, MIN_SHARDS)

    def catch(self, error: BadSampleError) -> None:
        shard, key, reason, detail = error.sample
        self.add(reason, shard, key, detail)

    def end_of_shard(self, samples: int) -> None:
        self._whole_shards += 1
        self._whole_samples += samples

    def lose(self, reason: str, shard: str, expected: int | None, read: int, detail: str = "") -> None:
        """Counts the rest of a shard as bad: of `expected` samples, or if that is unknown of as many as there are in
        the average shard, all but those that were `read`.
        """
        if expected is None:
            expected = self._whole_samples // max(1, self._whole_shards)
        count = max(1, expected - read)
        self.seen += count
        self._torn_shards += 1
        self.add(reason, shard, detail=detail, count=count)

    def end_of_pass(self) -> None:
        """Judges the count, however small; also raises when no sample was good."""
        if self.seen == self.reasons.total():
            raise DataError(f"the shards hold no usable sample: {self.summary()}")
        self._judge(0, 0)

    def take(self) -> tuple[BadSample, ...]:
        """The bad samples found since the last call."""
        found = self.found
        self.found = []
        return tuple(found)

    def examples(self) -> list[str]:
        """The first few bad samples, with what is wrong."""
        return [f"{found.key} {found.detail or found.reason}".strip() for found in self.found[:3]]

    def summary(self) -> str:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common())
        shards = ", ".join(f"{name} ({count})" for name, count in self.shards.most_common(5) if name)
        details = f" ({reasons}{'; most in ' if shards else ''}{shards})" if reasons else ""
        return f"{self.reasons.total()} of {self.seen} samples{details}"

    def _judge(self, min_seen: int, min_shards: int) -> None:
        """Judges what has been seen, if it is that much; whatever it is where nothing may be bad."""
        too_many = f"more than {self.max_fraction:.0%}"
        more = ""
        if any(self.shards):  # of other data the fraction is fixed
            too_many = f"more than max_bad_fraction={self.max_fraction} allows"
            more = ", or allow more"
        if self.reasons.total() > self.max_fraction * self.seen and (self.seen >= min_seen or not self.max_fraction):
            example = f", e.g. {self.examples()[-1]}" if self.found else ""
            raise DataError(f"too many bad samples, {too_many}: {self.summary()}{example}; fix or remove them{more}")
        shards = self._whole_shards + self._torn_shards
        if self._torn_shards > self.max_fraction * shards and shards >= min_shards:
            torn = f"{self._torn_shards} of {shards} shards, and {self.summary()}"
            raise DataError(f"too many torn or empty shards, {too_many}: {torn}: restore or remove them, or allow more")

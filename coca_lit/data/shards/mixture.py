"""Several shard sets, or several captions of an image, in given proportions."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from coca_lit.data.shards.listing import Shard

T = TypeVar("T")


class Source(NamedTuple):
    """One shard set of a mixture; a name of its own only where there are several."""

    name: str
    shards: Sequence[Shard]
    weight: float = 1.0


def interleave(streams: Sequence[Iterator[T]], weights: Sequence[float]) -> Iterator[T]:
    """Endless streams in one, see `weighted_round_robin`."""
    return (next(streams[i]) for i, _ in weighted_round_robin(weights, [0] * len(weights)))


def weighted_round_robin(weights: Sequence[float], given: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Endless: whose turn it is, and how many items that one has given before.

    Item k of a source with weight w is due at (k + 1/2) / w (Webster's method of dealing out seats). After n items
    each has given its share of n to within one item or so. The order depends on the weights alone.

    Args:
        given: items of each before the first turn, as `counts_after` has them.
    """
    counts = list(given)
    due = [(count + 0.5) / weight for count, weight in zip(counts, weights, strict=True)]
    while True:
        i = due.index(min(due))
        yield i, counts[i]
        counts[i] += 1
        due[i] = (counts[i] + 0.5) / weights[i]


def counts_after(n: int, weights: Sequence[float]) -> list[int]:
    """How many of the first `n` items each source gives, without going through them all."""
    total = sum(weights)
    time = max(0, n - 2 * len(weights)) / total  # by then surely fewer than n are due, and whatever is due has come
    given = [int(weight * time + 0.5) for weight in weights]
    for i, _ in weighted_round_robin(weights, given):
        if sum(given) == n:
            break
        given[i] += 1
    return given


def draw(options: Mapping[str, Sequence[T]], weights: Mapping[str, float], rng: random.Random) -> T:
    """One item of one option, chosen by the weights of those options that are there, then evenly among its items."""
    names = list(options)
    (name,) = rng.choices(names, [weights[name] for name in names])
    return rng.choice(options[name])


def check_weights(what: str, weights: Mapping[str, float]) -> dict[str, float]:
    """Positive numbers, at least one; raises `ValueError`."""
    numbers = {k: v for k, v in weights.items() if isinstance(v, int | float) and not isinstance(v, bool) and v > 0}
    if numbers != weights or not weights:
        raise ValueError(f"{what} must give each name a weight above 0, not {dict(weights)}")
    return numbers

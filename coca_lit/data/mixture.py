"""Several shard sets, or several captions of an image, in given proportions."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from coca_lit.data.shard_set import Shard

T = TypeVar("T")


class Source(NamedTuple):
    """One shard set of a mixture; a name of its own only where there are several."""

    name: str
    shards: Sequence[Shard]
    weight: float = 1.0


def interleave(streams: Sequence[Iterator[T]], weights: Sequence[float]) -> Iterator[T]:
    """Endless streams in one: the next item always comes from the stream that is furthest behind its share.

    After n items each stream has given its share of n to within one item (two streams; a few more, slightly more). The
    order depends on the weights alone, so that a position in the whole is a position in each part.
    """
    total = sum(weights)
    shares, given = [weight / total for weight in weights], [0] * len(weights)
    n = 0
    while True:
        n += 1
        behind = [share * n - count for share, count in zip(shares, given, strict=True)]
        i = behind.index(max(behind))
        given[i] += 1
        yield next(streams[i])


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

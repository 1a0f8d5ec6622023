"""Several sets of shards, or several captions of an image, in given proportions."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from coca_lit.distributed import stable_seed

if TYPE_CHECKING:
    from coca_lit.data.shards.index import TarIndex

T = TypeVar("T")


class Source(NamedTuple):
    """One set of shards or records in a mixture; the name is empty where there is only one."""

    name: str
    samples: int
    weight: float = 1.0
    shards: "Sequence[TarIndex]" = ()


def weighted_round_robin(weights: Sequence[float], counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Endless (i, k): the next item is the k-th of source i.

    Item k of a source with weight w is due at (k + 1/2) / w (Webster's method of apportioning seats). After n items
    each source has contributed its share of n to within about one item. The order depends on the weights alone.

    Args:
        counts: items that each source has contributed before, see `counts_after`.
    """
    counts = list(counts)
    due = [(count + 0.5) / weight for count, weight in zip(counts, weights, strict=True)]
    while True:
        i = due.index(min(due))
        yield i, counts[i]
        counts[i] += 1
        due[i] = (counts[i] + 0.5) / weights[i]


def counts_after(n: int, weights: Sequence[float]) -> list[int]:
    """How many of the first `n` items each source contributes, in time independent of `n`."""
    total = sum(weights)
    time = max(0, n - 2 * len(weights)) / total  # fewer than n items are due by then, and all of them have been taken
    counts = [int(weight * time + 0.5) for weight in weights]
    for i, _ in weighted_round_robin(weights, counts):
        if sum(counts) == n:
            break
        counts[i] += 1
    return counts


def draw(options: Mapping[str, Sequence[T]], weights: Mapping[str, float], *seed: int | str) -> T:
    """Draws an option by the weights of those present, then one of its items uniformly, both from the seed."""
    names = list(options)
    if len(names) == 1 and len(options[names[0]]) == 1:
        return options[names[0]][0]  # true of most images; seeding a generator takes longer than tokenising
    rng = random.Random(stable_seed(*seed))
    (name,) = rng.choices(names, [weights[name] for name in names])
    return rng.choice(options[name])


def check_weights(what: str, weights: Mapping[str, float]) -> dict[str, float]:
    """The weights; raises `ValueError` unless there is at least one and all are positive numbers."""
    numbers = {k: v for k, v in weights.items() if isinstance(v, int | float) and not isinstance(v, bool) and v > 0}
    if numbers != weights or not weights:
        raise ValueError(f"{what} must give each name a weight above 0, not {dict(weights)}")
    return numbers

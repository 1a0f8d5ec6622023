"""Several sets of shards, several captions of an image or records of several sources, in given proportions."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from coca_lit.data.records import Record
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError

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


def weighted_records(
    split: str, sources: Mapping[str, Callable[[str], Sequence[Record]]], weights: Mapping[str, float]
) -> list[Record]:
    """Records of several sources, such as captioned photos and classes as texts (the CoCa paper mixes ALIGN and JFT).

    In "train" those of all sources, each source with the share of its weight: the one that is largest for its
    weight once, the others as often as it takes, in whole passes and a random part of one. In other splits those of the
    first source alone, so that validation does not depend on the weights.

    Args:
        sources: split -> records, by name.
        weights: above 0, of each source. A repeated record has a crop and a caption of its own each time.

    Raises:
        DataError: a source has no weight, or no records.
    """
    try:
        weights = check_weights("weights", weights)
    except ValueError as error:
        raise DataError(str(error)) from error
    if weights.keys() != sources.keys() or not sources:
        raise DataError(
            f"weights are of {', '.join(weights)}, and sources {', '.join(sources)}: give each one a weight"
        )
    if split != "train":
        return list(next(iter(sources.values()))(split))
    found = {name: list(read(split)) for name, read in sources.items()}
    empty = [name for name, records in found.items() if not records]
    if empty:
        raise DataError(f"the source {empty[0]} has no training records: check its folder")
    per_weight = max(len(records) / weights[name] for name, records in found.items())
    mixed: list[Record] = []
    for name, records in found.items():
        passes, rest = divmod(round(per_weight * weights[name]), len(records))
        some = random.Random(stable_seed("weighted", name)).sample(records, rest)
        for number, part in enumerate([*[records] * passes, some]):
            mixed += [record._replace(id=f"{name}/{number}/{record.id}") for record in part]
    return mixed

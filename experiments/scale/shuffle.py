"""How well a stream of shards is mixed: our reader's order, OpenCLIP's and random orders, at the size of LAION-2B.
Writes shuffle.csv and shuffle.png. No image is read: a sample is its number in the list that the shards came from.

python experiments/scale/shuffle.py
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from webdataset.filters import _shuffle  # what webdataset.shuffle and OpenCLIP's own shuffle of shards call

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.shards.listing import Shard
from coca_lit.data.shards.mixture import Source
from coca_lit.data.shards.stream import OPEN_SHARDS, SHUFFLE_BUFFER, ShardOrder
from experiments.scale.report import record
from experiments.scale.scale import IMAGE, SHARDS

SAMPLES = 10_000  # of a shard
RANKS, WORKERS, BATCH = 384, 8, 240
READERS = RANKS * WORKERS


class Order(NamedTuple):
    """A pass of one worker."""

    name: str
    buffer: int  # samples in its memory
    shards: Callable[[], Sequence[int]]  # of all workers, in the order in which they are dealt out
    mixed: Callable[[Sequence[int]], Iterator[int]]  # (shards of this worker) -> samples


class Sample(int):
    """A number in the place of a sample of a shard."""

    bytes = 0  # that it takes in the buffer


def in_order(shards: Sequence[int]) -> Iterator[int]:
    return (shard * SAMPLES + i for shard in shards for i in range(SAMPLES))


def ours(buffer: int, at_once: int = OPEN_SHARDS) -> Order:
    """The reader itself; of a shard it only sees numbers."""

    def mixed(shards: Sequence[int]) -> Iterator[int]:
        sources = [Source("", [Shard(str(shard)) for shard in shards])]
        order = ShardOrder(sources, shuffle_buffer=buffer, open_shards=at_once)
        with patch(
            "coca_lit.data.shards.stream.read_shard", lambda shard, *_, **__: map(Sample, in_order([int(shard.name)]))
        ):
            found: Iterator[Any] = order.samples(0, 0, 1, BadSamples(1.0))  # of numbers, by the patch
            yield from (sample.sample for sample in islice(found, len(shards) * SAMPLES))

    default = " (default)" if (buffer, at_once) == (SHUFFLE_BUFFER, OPEN_SHARDS) else ""
    name = f"{at_once} open {'shard' if at_once == 1 else 'shards'}, shuffle_buffer={buffer}{default}"
    return Order(name, buffer, lambda: random.Random(0).sample(range(SHARDS), SHARDS), mixed)


def open_clip(resampled: bool) -> Order:
    """OpenCLIP 3.3.0: shards in a buffer of 2,000, or drawn with replacement; samples in one of 5,000."""

    def shards() -> list[int]:
        if resampled:
            return random.Random(0).choices(range(SHARDS), k=SHARDS)
        return list(_shuffle(iter(range(SHARDS)), 2000, 500, random.Random(0)))

    name = "OpenCLIP" + (", --dataset-resampled" if resampled else "")
    return Order(name, 5000, shards, lambda own: _shuffle(in_order(own), 5000, 1000, random.Random(0)))


def permuted() -> Order:
    def mixed(shards: Sequence[int]) -> Iterator[int]:
        return iter(np.random.default_rng(0).permutation([*in_order(shards)]).tolist())

    return Order("a worker's shards, permuted", 0, lambda: random.Random(0).sample(range(SHARDS), SHARDS), mixed)


def whole_set() -> Order:
    """A permutation of all samples, of which a worker gets some: nothing is read in shards."""

    def mixed(shards: Sequence[int]) -> Iterator[int]:
        return iter(np.random.default_rng(0).integers(0, SHARDS * SAMPLES, len(shards) * SAMPLES).tolist())

    return Order("all samples, permuted", 0, lambda: range(0), mixed)


def quality(order: Order) -> tuple[dict[str, Any], np.ndarray]:
    """A row, and the samples of the worker in their order. GPUs share no shards, unless all samples are permuted."""
    plan = order.shards()
    own = plan[::READERS] if plan else [*range(SHARDS // READERS)]
    samples = np.fromiter(order.mixed(own), np.int64)
    batches = (samples // SAMPLES)[: len(samples) // BATCH * BATCH].reshape(-1, BATCH)
    places = np.arange(len(plan)) // READERS  # of shards in the pass of their worker
    same = float(np.mean([_same(batch) for batch in batches]))
    row = {
        "order": order.name,
        "shards in a GPU's batch": float(np.mean([len(np.unique(batch)) for batch in batches])),
        "pairs of one shard, %": 100 * same,
        "in the global batch, %": 100 * (same * (BATCH - 1) / (RANKS * BATCH - 1) if plan else same),
        "batch like the last one": _likeness(batches),
        "shard spread over, % of a pass": 100 * _spread(samples) if plan else 90.0,  # that of evenly spread places
        "list order kept": np.corrcoef(plan, places)[0, 1] if plan else 0.0,
        "seen in a pass, %": 100 * len(set(plan)) / SHARDS if plan else 100.0,
        "buffers of 8 GPUs, GB": 8 * WORKERS * order.buffer * IMAGE / 1e9,
    }
    return row, samples


def _same(batch: np.ndarray) -> float:
    """The share of pairs of a batch's samples that come from one shard."""
    counts = np.unique(batch, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (BATCH * (BATCH - 1)))


def _likeness(batches: np.ndarray) -> float:
    """Correlation of a batch with the worker's next one, in the mean of a property that is one number per shard."""
    values = np.random.default_rng(1).standard_normal(SHARDS)[batches].mean(axis=1)
    return float(np.corrcoef(values[:-1], values[1:])[0, 1])


def _spread(samples: np.ndarray) -> float:
    """Between the 5th and the 95th percentile of the places of a shard's samples, mean over shards."""
    shards, places = samples // SAMPLES, np.arange(len(samples)) / len(samples)
    chosen = [places[shards == shard] for shard in np.unique(shards)[:30]]
    return float(np.mean([np.quantile(own, 0.95) - np.quantile(own, 0.05) for own in chosen if len(own) > 1]))


def draw(orders: Sequence[tuple[str, np.ndarray]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(orders), figsize=(3.1 * len(orders), 3.2), layout="constrained", sharey=True)
    for axis, (name, samples) in zip(axes, orders, strict=True):
        rank = {shard: i for i, shard in enumerate(dict.fromkeys((samples // SAMPLES).tolist()))}
        chosen = np.arange(0, len(samples), 37)
        stored = [rank[s // SAMPLES] + s % SAMPLES / SAMPLES for s in samples[chosen].tolist()]
        axis.plot(chosen / 1000, stored, ",", alpha=0.7)
        axis.set(title=name, xlabel="delivered as (thousands)")
        axis.title.set_fontsize(10)
    axes[0].set_ylabel("stored in the worker's shard no.")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


def main() -> None:
    one_by_one = [ours(1, 1), ours(1000, 1), ours(SHUFFLE_BUFFER, 1)]
    several = [ours(1000), ours(SHUFFLE_BUFFER, OPEN_SHARDS // 2), ours(SHUFFLE_BUFFER), ours(10_000), ours(50_000)]
    orders = [*one_by_one, *several, open_clip(False), open_clip(True), permuted(), whole_set()]
    found = {order.name: quality(order) for order in orders}
    record("shuffle", [row for row, _ in found.values()])
    shown = (orders[1], orders[5], orders[8], orders[10])
    draw([(order.name, found[order.name][1]) for order in shown])


if __name__ == "__main__":
    main()

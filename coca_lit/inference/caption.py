"""Captions for files and shards: images are decoded ahead of the model, captions written as soon as they are there.

Batches are the same however many processes share the work and wherever it goes on after a stop, and sampling is seeded
by batch: so are the captions.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coca_lit.distributed import gather_objects, rank, world_size
from coca_lit.inference.images import Source, load_images
from coca_lit.inference.inputs import OpenShard, Shard, Unit
from coca_lit.inference.writer import Captions, Writer
from coca_lit.models import CoCa, kernels
from coca_lit.progress import Reporter
from coca_lit.seeding import stable_seed


class Totals(NamedTuple):
    """What was done, over all processes."""

    images: int
    unreadable: int
    seconds: float  # of the slowest process
    model_share: float  # of the time of all processes

    def __str__(self) -> str:
        skipped = f", {self.unreadable} unreadable and skipped" if self.unreadable else ""
        rate = self.images / max(self.seconds, 1e-9)
        share = f"{self.model_share:.0%} of the time inside the model"
        return f"{self.images} images in {self.seconds:.1f} s, {rate:.2f} images/s, {share}{skipped}"


class _Batch(NamedTuple):
    sources: Sequence[Source]
    ends: OpenShard | None  # the shard that this batch is the last of
    share: float  # of this process's work that is done with this batch


def caption(
    model: CoCa,
    units: Sequence[Unit],
    writer: Writer,
    options: Mapping[str, Any],
    batch_size: int = 32,
    num_workers: int = 0,
    seed: int = 0,
) -> Totals:
    """Captions this process's part of the units that are not written yet; the last process to finish completes the
    result.

    Args:
        options: of `CoCa.generate`.
        batch_size: images of a shard that are captioned together; files come in batches already.
        num_workers: processes that decode images.
        seed: of sampling.
    """
    captioned, unreadable, inside, start = 0, 0, 0.0, time.perf_counter()
    with Reporter("captioning") as reporter, kernels.packed_weights(model):  # once, not in every batch
        planned: deque[_Batch] = deque()
        plan = _plan(units, writer, batch_size, reporter, planned)
        for positions, pixels, broken in load_images(plan, model.image_size, num_workers):
            batch = planned.popleft()
            new = {i for i in positions if not writer.has(batch.sources[i])}
            if new:
                began = time.perf_counter()
                texts = _write(model, pixels, options, stable_seed(seed, batch.sources[0].name))
                inside += time.perf_counter() - began
                found = dict(zip(positions, texts, strict=True))
                writer.write({batch.sources[i]: found[i] for i in positions if i in new})
            for reason in broken.values():
                reporter.print(f"skipped: {reason}")
            if batch.ends is not None:
                writer.end_shard(batch.ends)
            captioned, unreadable = captioned + len(new), unreadable + len(broken)
            reporter.advance(len(new), batch.share)
        writer.finish()
    return _total(captioned, unreadable, time.perf_counter() - start, inside)


def _plan(
    units: Sequence[Unit], writer: Writer, batch_size: int, reporter: Reporter, planned: deque[_Batch]
) -> Iterator[Sequence[Source]]:
    """The sources of this process's batches, which are noted in `planned` as well."""
    own = units[rank() :: world_size()]
    for done, unit in enumerate(own):
        if writer.has_unit(unit):
            continue
        opened = unit.open() if isinstance(unit, Shard) else unit
        shard = opened if isinstance(opened, OpenShard) else None
        if shard and shard.problem:
            reporter.print(f"{shard.path} is broken or truncated ({shard.problem}): captioning what can be read")
        sources = opened.sources
        starts = range(0, max(len(sources), 1), batch_size)  # a shard without samples is one empty batch
        for start in starts:
            batch = sources[start : start + batch_size]
            if not batch or not all(map(writer.has, batch)):
                share = (done + (start / batch_size + 1) / len(starts)) / len(own)
                planned.append(_Batch(batch, shard if start == starts[-1] else None, share))
                yield batch


def _write(model: CoCa, pixels: Tensor, options: Mapping[str, Any], seed: int) -> list[Captions]:
    """Captions of images (B, 3, S, S), without blanks at their ends and line breaks; at least one for each."""
    options = dict(options)
    if options.get("strategy") == "sample":
        options["generator"] = torch.Generator(model.device).manual_seed(seed)
    ids = model.generate(pixels.to(model.device), **options)  # (B, L), or (B, N, L) with num_captions
    rows = ids if ids.ndim == 3 else ids[:, None]
    texts = [[" ".join(model.tokenizer.decode(row).split()) for row in captions] for captions in rows.cpu()]
    return [[first, *filter(None, others)] for first, *others in texts]  # beams that never were are empty


def _total(images: int, unreadable: int, seconds: float, inside: float) -> Totals:
    parts = gather_objects(Totals(images, unreadable, seconds, inside / max(seconds, 1e-9)))
    time_inside = sum(part.seconds * part.model_share for part in parts)
    return Totals(
        sum(part.images for part in parts),
        sum(part.unreadable for part in parts),
        max(part.seconds for part in parts),
        time_inside / max(sum(part.seconds for part in parts), 1e-9),
    )

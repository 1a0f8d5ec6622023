"""Captions for files and shards: images are decoded ahead of the model, captions are written as soon as they exist.

Batches do not depend on the number of processes nor on where the work resumes, and sampling is seeded by batch; so the
captions do not depend on them either.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from coca_lit.data.prefetch import worker_errors
from coca_lit.distributed import gather_objects, rank, stable_seed, world_size
from coca_lit.errors import DataError
from coca_lit.models import CoCa, kernels
from coca_lit.models.generation.options import complete
from coca_lit.models.inputs import Images
from coca_lit.progress import ProgressBar
from coca_lit.reading import printable
from coca_lit.tools.caption.inputs import MayPass, OpenShard, Source, Unit, load_images, open_shard
from coca_lit.tools.caption.outputs import Captions, Writer


class Totals(NamedTuple):
    """The work of all processes."""

    images: int
    unreadable: int
    seconds: float  # of the slowest process
    model_share: float  # of the time of all processes
    torn: int = 0  # shards of which a part cannot be read

    def __str__(self) -> str:
        skipped = f", {self.unreadable} unreadable and skipped" if self.unreadable else ""
        rate = self.images / max(self.seconds, 1e-9)
        share = f"{self.model_share:.0%} of the time inside the model"
        return f"{self.images} images in {self.seconds:.1f} s, {rate:.2f} images/s, {share}{skipped}"


class _Batch(NamedTuple):
    sources: Sequence[Source]
    ends: OpenShard | None  # the shard of which this is the last batch
    share: float  # of this process's work that is done after this batch


def caption_units(
    model: CoCa,
    units: Sequence[Unit],
    writer: Writer,
    options: Mapping[str, Any],
    batch_size: int = 32,
    num_workers: int = 0,
    seed: int = 0,
) -> Totals:
    """Captions this process's share of the units that are not written yet, and returns when all processes are done.

    Args:
        options: of `CoCa.generate`.
        batch_size: images of a shard that are captioned together; files come in batches already.
        num_workers: processes that decode images.
        seed: for sampling.
    """
    captioned = 0
    unreadable = 0
    torn = 0
    inside = 0.0
    start = time.perf_counter()
    with ProgressBar("captioning") as progress, worker_errors(), kernels.packed_weights(model):  # not in every batch
        planned: deque[_Batch] = deque()
        plan = _plan(units, writer, batch_size, progress, planned)
        for positions, pixels, broken in load_images(plan, model.preprocessing, num_workers):
            batch = planned.popleft()
            new = {i for i in positions if not writer.has(batch.sources[i])}
            if new:
                began = time.perf_counter()
                texts = _generate(model, pixels, options, stable_seed(seed, batch.sources[0].name))
                inside += time.perf_counter() - began
                found = dict(zip(positions, texts, strict=True))
                writer.write({batch.sources[i]: found[i] for i in positions if i in new})
            for reason in broken.values():
                if isinstance(reason, MayPass) and batch.sources[0].size >= 0:  # a new shard would lack it for ever
                    raise DataError(f"{reason}: start again, or leave this shard out")
                progress.print(printable(f"skipped: {reason}"))
            if batch.ends is not None:
                writer.end_shard(batch.ends)
                torn += bool(batch.ends.problem)
            captioned += len(new)
            unreadable += len(broken)
            progress.advance(len(new), batch.share)
        writer.finish()
    seconds = time.perf_counter() - start
    return total(gather_objects(Totals(captioned, unreadable, seconds, inside / max(seconds, 1e-9), torn)))


def _plan(
    units: Sequence[Unit], writer: Writer, batch_size: int, progress: ProgressBar, planned: deque[_Batch]
) -> Iterator[Sequence[Source]]:
    """The sources of this process's batches; each batch is also appended to `planned`."""
    own = units[rank() :: world_size()]
    for done, unit in enumerate(own):
        if writer.has_unit(unit):
            continue
        shard: OpenShard | None = None
        if isinstance(unit, Path):
            shard = open_shard(unit)
            if shard.problem:
                broken = f"{shard.path} is broken or truncated ({shard.problem}): captioning what can be read"
                progress.print(printable(broken))
            sources = shard.sources
        else:
            sources = unit
        starts = range(0, max(len(sources), 1), batch_size)  # a shard without samples is one empty batch
        for start in starts:
            batch = sources[start : start + batch_size]
            if not batch or not all(map(writer.has, batch)):
                share = (done + (start / batch_size + 1) / len(starts)) / len(own)
                planned.append(_Batch(batch, shard if start == starts[-1] else None, share))
                yield batch


def _generate(model: CoCa, pixels: Images, options: Mapping[str, Any], seed: int) -> list[Captions]:
    """Captions of images, with white space normalised to single blanks.

    As many for each image as were requested, even if a draw has no words; fewer only where beam search found fewer.
    """
    options = dict(options)
    if complete(options).strategy == "sample":  # also of a preset
        options["generator"] = torch.Generator(model.device).manual_seed(seed)
    ids = model.generate(pixels.to(model.device), **options)  # (B, L), or (B, N, L) with num_captions
    rows = ids if ids.ndim == 3 else ids[:, None]
    written = rows[:, :, 0] != model.tokenizer.pad_id  # (B, N); a beam without a caption is all padding
    written[:, 0] = True
    return [
        [" ".join(model.tokenizer.decode(row).split()) for row in captions[kept]]
        for captions, kept in zip(rows.cpu(), written.cpu(), strict=True)
    ]


def total(parts: Sequence[Totals]) -> Totals:
    """Of processes, or of shards, side by side; of none as well."""
    time_inside = sum(part.seconds * part.model_share for part in parts)
    return Totals(
        sum(part.images for part in parts),
        sum(part.unreadable for part in parts),
        max((part.seconds for part in parts), default=0.0),
        time_inside / max(sum(part.seconds for part in parts), 1e-9),
        sum(part.torn for part in parts),
    )

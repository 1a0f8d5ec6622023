"""Embeddings of fixed crops and of all captions by several teachers, see `coca_lit.data.shards.reinforced`.

Samples are read and decoded as a training does, once for all crops and teachers. A file is complete or absent, and a
repeated command skips the shards that have one.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from coca_lit.data.bad_samples import BadSample, BadSamples
from coca_lit.data.pixels import decode_pixels
from coca_lit.data.prefetch import worker_errors, worker_options
from coca_lit.data.shards.index import TarIndex
from coca_lit.data.shards.reinforced import Reinforced, reinforced_path, write_reinforced
from coca_lit.data.sources import as_tensor
from coca_lit.data.transforms import Box, random_box, resized
from coca_lit.distributed import stable_seed
from coca_lit.errors import ConfigError, DataError
from coca_lit.evals.inference import evaluating
from coca_lit.files import claim, size_and_time
from coca_lit.machine import best_device
from coca_lit.models import DualEncoder
from coca_lit.tools.prepare.annotate import (
    AnnotatedShard,
    ShardSamples,
    check_source,
    index_of,
    load_annotator,
)

SETTINGS = "teachers.settings.json"  # beside the files of a folder: what made them all


class Teaching(NamedTuple):
    """How shards are embedded; plain values, which any engine can send to its workers.

    Args:
        teachers: checkpoints for `load_dual_encoder`, CLIPs too.
        caption_keys: "txt", or fields of the samples' JSON that hold captions, all of which are embedded.
        views: crops of each image.
        seed: of the crops.
        output, batch_size, num_workers, bf16: as of `Judgement`.
    """

    teachers: tuple[str, ...]
    output: Path | None = None
    caption_keys: tuple[str, ...] = ("txt",)
    views: int = 4
    seed: int = 0
    batch_size: int = 32
    num_workers: int = 0
    bf16: bool = False


def claim_outputs(shards: Sequence[Path], teaching: Teaching) -> None:
    """Records beside the files to come what makes them; all that is wrong with the teachers is told here.

    Raises:
        ConfigError: there is no such teacher, or one takes images of any shape.
        DataError: the folder has embeddings that are made otherwise.
    """
    for teacher in _teachers(teaching):
        if "patch_size" in teacher.preprocessing:
            raise ConfigError("a teacher takes images of any shape, and crops are square: choose another one")
    for folder in sorted({teaching.output or shard.parent for shard in shards}):
        claim(folder / SETTINGS, _settings(teaching))


def teach_shard(shard: Path, teaching: Teaching) -> AnnotatedShard:
    """Embeds each sample of a local, uncompressed tar, unless that is done.

    Raises:
        DataError: the file cannot be written or is made otherwise; or the shard is not what its manifest records.
    """
    path = reinforced_path(str(shard), teaching.output or shard.parent)
    stamp = dict(zip(("bytes", "modified"), size_and_time(shard), strict=True))
    claim(path.parent / SETTINGS, _settings(teaching))  # again: a checkpoint may have changed since the command began
    about = {**_settings(teaching), **stamp, "source": str(shard.resolve())}
    if path.exists():
        known = Reinforced(path).about
        if not _settings(teaching).items() <= known.items():
            raise DataError(f"{path} was made with other settings: choose another output, or remove it")
        if stamp.items() <= known.items():
            return AnnotatedShard(path, known["samples"], known["bad"], known["examples"], skipped=True)
        check_source(path, known, shard)
    bad, models = BadSamples(1.0, quiet=True), _teachers(teaching)
    for model in models:
        model.to(best_device())
    with worker_errors():
        index = index_of(shard, path.parent, bad)
        rows = [row for batch in _embedded(models, index, teaching, bad) for row in batch]
    if not rows:
        raise DataError(f"{shard} has no usable sample: {bad.summary()}")
    scales = [float(model.logit_scale.detach().exp()) for model in models]
    left_out: dict[str, Any] = {"bad": dict(bad.reasons), "examples": bad.examples()}
    write_reinforced(path, _tensors(rows), {**about, "logit_scales": scales, "samples": len(rows), **left_out})
    return AnnotatedShard(path, len(rows), **left_out, skipped=False)


def _settings(teaching: Teaching) -> dict[str, Any]:
    """What the embeddings depend on, beside the shard."""
    return {
        "teachers": [load_annotator(checkpoint, teaching.bf16)[1] for checkpoint in teaching.teachers],
        "precision": "bf16" if teaching.bf16 else "fp32",
        "caption_keys": [*teaching.caption_keys],
        "views": teaching.views,
        "seed": teaching.seed,
    }


def _teachers(teaching: Teaching) -> list[DualEncoder]:
    return [load_annotator(checkpoint, teaching.bf16)[0] for checkpoint in teaching.teachers]


class _Sample(NamedTuple):
    key: str
    captions: list[str]
    boxes: list[Box]
    crops: dict[int, Tensor]  # (V, 3, size, size) by size, until it is embedded
    images: Sequence[Tensor] = ()  # (V, E) of each teacher
    texts: Sequence[Tensor] = ()  # (C, E) of each teacher


def _cropped(
    asked: Teaching, sizes: Sequence[int], key: str, content: bytes, captions: Mapping[str, Sequence[str]]
) -> _Sample:
    """A sample, decoded once and cropped for every size that a teacher takes."""
    pixels = as_tensor(decode_pixels(content, "it"))
    height, width = pixels.shape[1:]
    seeds = (stable_seed("crop", asked.seed, view, key) for view in range(asked.views))
    boxes = [random_box(height, width, random.Random(seed)) for seed in seeds]
    crops = {size: torch.stack([resized(pixels, box, (size, size)) for box in boxes]) for size in sizes}
    texts = dict.fromkeys(text for texts in captions.values() for text in texts)
    return _Sample(key, [*texts], boxes, crops)


def _embedded(
    models: Sequence[DualEncoder], index: TarIndex, teaching: Teaching, bad: BadSamples
) -> Iterator[list[_Sample]]:
    sizes = [int(model.preprocessing["size"]) for model in models]
    samples = ShardSamples(index, teaching.caption_keys, partial(_cropped, teaching, sorted({*sizes})))
    options = worker_options(teaching.num_workers)
    for batch in DataLoader(samples, teaching.batch_size, collate_fn=list, **options):
        good = [sample for sample in batch if isinstance(sample, _Sample)]
        for sample in batch:
            if isinstance(sample, BadSample):
                bad.add(sample.reason, sample.shard, sample.key, sample.detail)
        if not good:
            continue
        captions, counts = [text for sample in good for text in sample.captions], [len(s.captions) for s in good]
        images, texts = [], []
        for model, size in zip(models, sizes, strict=True):
            pixels = torch.cat([sample.crops[size] for sample in good])  # (b · V, 3, size, size)
            images.append(_embed(model, pixels).split(teaching.views))
            texts.append(_embed(model, captions).split(counts))
        yield [
            sample._replace(crops={}, images=[of[i] for of in images], texts=[of[i] for of in texts])
            for i, sample in enumerate(good)
        ]


@torch.inference_mode()
def _embed(model: DualEncoder, inputs: Tensor | list[str]) -> Tensor:
    """(n, E) fp16 on the host, of pixels or of texts."""
    if isinstance(inputs, Tensor):
        found: Tensor = evaluating(model, model.encode_image, inputs.to(model.device))
    else:
        found = evaluating(model, model.encode_text, model.tokenizer.tokens_of(inputs).to(model.device))
    return found.half().cpu()


def _tensors(rows: Sequence[_Sample]) -> dict[str, Tensor]:
    """As `write_reinforced` takes them; captions are padded to the most that a sample has."""
    most = max(len(row.captions) for row in rows)
    known = [[*map(stable_seed, row.captions)] for row in rows]
    tensors = {
        "keys": torch.tensor([stable_seed(row.key) for row in rows]),
        "captions": torch.tensor([seeds + [0] * (most - len(seeds)) for seeds in known]),
        "boxes": torch.tensor([row.boxes for row in rows], dtype=torch.int32),
    }
    for k in range(len(rows[0].images)):
        tensors[f"images.{k}"] = torch.stack([row.images[k] for row in rows])
        missing = [(0, 0, 0, most - len(row.captions)) for row in rows]
        padded = [torch.nn.functional.pad(row.texts[k], pad) for row, pad in zip(rows, missing, strict=True)]
        tensors[f"texts.{k}"] = torch.stack(padded)
    return tensors

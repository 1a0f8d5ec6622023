"""Embeddings of fixed crops and of all captions by several teachers, see `coca_lit.projects.distillation.reinforced`.

Samples are read and decoded as a training does, once for all crops and teachers. A file is complete or absent, and a
repeated command skips the shards that have one.

Letters: V crops of an image, C captions, E width of a teacher's embeddings.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from coca_lit.data.bad_samples import BadSample, BadSamples
from coca_lit.data.pixels import decode_pixels
from coca_lit.data.prefetch import worker_errors, worker_options
from coca_lit.data.shards.index import TarIndex
from coca_lit.data.sources import as_tensor
from coca_lit.data.transforms import Box, random_box, resized
from coca_lit.distributed import stable_seed
from coca_lit.errors import ConfigError, DataError
from coca_lit.evals.inference import evaluating
from coca_lit.files import size_and_time
from coca_lit.machine import best_device
from coca_lit.models import DualEncoder
from coca_lit.projects.distillation.reinforced import Reinforced, reinforced_path, write_reinforced
from coca_lit.tools.claims import claim
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
        output: folder of the files; None writes them beside the shards.
        caption_keys: "txt", or fields of the samples' JSON that hold captions, all of which are embedded.
        views: crops of each image.
        seed: of the crops.
        batch_size: samples at a time.
        num_workers: processes that decode images; 0 decodes in this one.
        bf16: whether the teachers compute in bfloat16.
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
        ConfigError: there is no such teacher, or one takes no square images.
        DataError: the folder has embeddings that are made otherwise.
    """
    for teacher in _teachers(teaching):
        if "input_kind" in teacher.preprocessing:
            what = teacher.preprocessing["input_kind"].what
            raise ConfigError(f"a teacher takes {what}, and crops are square: choose another one")
    for folder in sorted({teaching.output or shard.parent for shard in shards}):
        claim(folder / SETTINGS, _settings(teaching))


def teach_shard(shard: Path, teaching: Teaching) -> AnnotatedShard:
    """Embeds each sample of a local, uncompressed tar, unless that is done.

    Raises:
        DataError: the file cannot be written or is made otherwise; or the shard is not what its manifest records.
    """
    folder = teaching.output or shard.parent
    path = reinforced_path(str(shard), folder)
    size, modified = size_and_time(shard)
    stamp = {"bytes": size, "modified": modified}
    settings = _settings(teaching)
    claim(folder / SETTINGS, settings)  # again: a checkpoint may have changed since the command began
    if path.exists():
        known = Reinforced(path).about
        if not settings.items() <= known.items():
            raise DataError(f"{path} was made with other settings: choose another output, or remove it")
        if stamp.items() <= known.items():
            return AnnotatedShard(path, known["samples"], known["bad"], known["examples"], skipped=True)
        check_source(path, known, shard)
    models = _teachers(teaching)
    for model in models:
        model.to(best_device())
    bad = BadSamples(1.0, quiet=True)
    samples: list[_Sample] = []
    with worker_errors():
        index = index_of(shard, folder, bad)
        for batch in _embedded(models, index, teaching, bad):
            samples += batch
    if not samples:
        raise DataError(f"{shard} has no usable sample: {bad.summary()}")
    about = settings | stamp
    about["source"] = str(shard.resolve())
    about["logit_scales"] = [float(model.logit_scale.detach().exp()) for model in models]
    about["samples"] = len(samples)
    about["bad"] = dict(bad.reasons)
    about["examples"] = bad.examples()
    write_reinforced(path, _tensors(samples), about)
    return AnnotatedShard(path, len(samples), about["bad"], about["examples"], skipped=False)


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
    teaching: Teaching, sizes: Sequence[int], key: str, content: bytes, captions: Mapping[str, Sequence[str]]
) -> _Sample:
    """A sample, decoded once and cropped for every size that a teacher takes."""
    pixels = as_tensor(decode_pixels(content, "it"))
    height, width = pixels.shape[1:]
    boxes = []
    for view in range(teaching.views):
        seed = stable_seed("crop", teaching.seed, view, key)
        boxes.append(random_box(height, width, random.Random(seed)))
    crops = {size: torch.stack([resized(pixels, box, (size, size)) for box in boxes]) for size in sizes}
    distinct = dict.fromkeys(text for texts in captions.values() for text in texts)
    return _Sample(key, [*distinct], boxes, crops)


def _embedded(
    models: Sequence[DualEncoder], index: TarIndex, teaching: Teaching, bad: BadSamples
) -> Iterator[list[_Sample]]:
    """The usable samples of a shard, a batch at a time; adds the others to `bad`."""
    sizes = [int(model.preprocessing["size"]) for model in models]
    samples = ShardSamples(index, teaching.caption_keys, partial(_cropped, teaching, sorted(set(sizes))))
    options = worker_options(teaching.num_workers)
    for batch in DataLoader(samples, teaching.batch_size, collate_fn=list, **options):
        good: list[_Sample] = []
        for sample in batch:
            if isinstance(sample, BadSample):
                bad.add(sample.reason, sample.shard, sample.key, sample.detail)
            else:
                good.append(sample)
        if not good:
            continue
        captions = [text for sample in good for text in sample.captions]
        counts = [len(sample.captions) for sample in good]
        images = []  # of each teacher, (V, E) of each sample
        texts = []  # of each teacher, (C, E) of each sample
        for model, size in zip(models, sizes, strict=True):
            crops = torch.cat([sample.crops[size] for sample in good])  # (samples · V, 3, size, size)
            images.append(_embed(model, crops).split(teaching.views))
            texts.append(_embed(model, captions).split(counts))
        of_samples = zip(good, zip(*images, strict=True), zip(*texts, strict=True), strict=True)
        yield [sample._replace(crops={}, images=views, texts=rows) for sample, views, rows in of_samples]


@torch.inference_mode()
def _embed(model: DualEncoder, inputs: Tensor | list[str]) -> Tensor:
    """(n, E) fp16 on the host, of pixels or of texts."""
    with evaluating(model):
        if isinstance(inputs, Tensor):
            features = model.encode_image(inputs.to(model.device))
        else:
            features = model.encode_text(model.tokenizer.tokens_of(inputs).to(model.device))
    return features.half().cpu()


def _tensors(samples: Sequence[_Sample]) -> dict[str, Tensor]:
    """As `write_reinforced` takes them; captions are padded to the most that a sample has."""
    most = max(len(sample.captions) for sample in samples)
    missing = [most - len(sample.captions) for sample in samples]
    captions = []
    for sample, absent in zip(samples, missing, strict=True):
        captions.append([stable_seed(text) for text in sample.captions] + [0] * absent)
    tensors = {
        "keys": torch.tensor([stable_seed(sample.key) for sample in samples]),
        "captions": torch.tensor(captions),
        "boxes": torch.tensor([sample.boxes for sample in samples], dtype=torch.int32),
    }
    for k in range(len(samples[0].images)):
        texts = [pad(sample.texts[k], (0, 0, 0, absent)) for sample, absent in zip(samples, missing, strict=True)]
        tensors[f"images.{k}"] = torch.stack([sample.images[k] for sample in samples])
        tensors[f"texts.{k}"] = torch.stack(texts)
    return tensors

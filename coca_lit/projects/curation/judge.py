"""Judging pairs: what a model and the pixels say about each sample of a shard, as Parquet beside the shard.

Samples are read and decoded as a training does: what counts as broken here is what it would skip. A file is complete
or absent, and a repeated command skips the shards that have one.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from coca_lit.data.bad_samples import BadSample, BadSamples
from coca_lit.data.near_duplicates import perceptual_hash
from coca_lit.data.pixels import decode_image
from coca_lit.data.prefetch import worker_errors, worker_options
from coca_lit.data.shards.index import TarIndex
from coca_lit.data.sources import Transform
from coca_lit.data.transforms import build_transform
from coca_lit.errors import DataError
from coca_lit.evals.inference import evaluating
from coca_lit.files import size_and_time
from coca_lit.machine import best_device
from coca_lit.models import DualEncoder, text_lengths
from coca_lit.models.inputs import Images, stack_images
from coca_lit.models.likelihood import log_likelihoods
from coca_lit.projects.curation.scores import SETTINGS, read_about, scores_path, write_scores
from coca_lit.tools.claims import claim
from coca_lit.tools.prepare.annotate import (
    AnnotatedShard,
    ShardSamples,
    check_source,
    index_of,
    load_annotator,
)


class Judgement(NamedTuple):
    """How shards are judged; plain values, which any engine can send to its workers.

    Args:
        checkpoint: for `load_dual_encoder`; without a decoder there is no likelihood.
        output: folder of the Parquet files; None writes them beside the shards.
        caption_key: "txt", or the field of the samples' JSON that holds the caption; of several the first is judged.
        embeddings: whether to keep the image features, by which near-duplicates are found.
        language: whether to identify the language of the captions.
        batch_size: pairs at a time; batches do not cross shards, so a score depends on nothing but its shard.
        num_workers: processes that decode images; 0 decodes in this one.
        bf16: whether the model computes in bfloat16.
    """

    checkpoint: str
    output: Path | None = None
    caption_key: str = "txt"
    embeddings: bool = False
    language: bool = False
    batch_size: int = 64
    num_workers: int = 0
    bf16: bool = False


def claim_outputs(shards: Sequence[Path], judgement: Judgement) -> None:
    """Records beside the files to come what makes them; all that is wrong with the model is told here.

    Raises:
        ConfigError: there is no such model.
        DataError: the folder has scores that are made otherwise.
    """
    settings = _settings(judgement)
    for folder in sorted({scores_path(shard, judgement.output).parent for shard in shards}):
        claim(folder / SETTINGS, settings)


def _settings(judgement: Judgement) -> dict[str, Any]:
    """What a score depends on, beside the shard."""
    return {
        "model": load_annotator(judgement.checkpoint, judgement.bf16)[1],
        "precision": "bf16, similarities in fp32" if judgement.bf16 else "fp32",
        "caption_key": judgement.caption_key,
        "embeddings": judgement.embeddings,
        "language": judgement.language,
    }


def judge_shard(shard: Path, judgement: Judgement) -> AnnotatedShard:
    """Scores each pair of a local, uncompressed tar, unless that is done.

    Raises:
        DataError: the scores in that folder are made by another model or otherwise, or cannot be written; or the shard
            is not what its manifest records.
    """
    path, settings, stamp = scores_path(shard, judgement.output), _settings(judgement), [*size_and_time(shard)]
    claim(path.parent / SETTINGS, settings)  # again: the checkpoint may have changed since the command began
    if path.exists():
        known = read_about(path)
        if not settings.items() <= known.items():
            raise DataError(f"{path} was made with other settings: choose another output, or remove it")
        if known["shard"] == stamp:
            return AnnotatedShard(path, known["samples"], known["bad"], known["examples"], skipped=True)
        check_source(path, known, shard)
    model, _ = load_annotator(judgement.checkpoint, judgement.bf16)
    model.to(best_device())
    bad = BadSamples(1.0, quiet=True)
    with worker_errors():
        index = index_of(shard, path.parent, bad)
        batches = list(_judged(model, index, judgement, bad))
    columns: dict[str, Any] = {
        name: np.concatenate([batch[name] for batch in batches]) for name in (batches[0] if batches else ())
    }
    left_out: dict[str, Any] = {"bad": dict(bad.reasons), "examples": bad.examples()}
    of_shard = {"shard": stamp, "content": index.stamp.content, "source": str(shard.resolve())}
    write_scores(path, shard.name, columns, {**settings, **of_shard, **left_out})
    return AnnotatedShard(path, len(columns["key"]) if columns else 0, **left_out, skipped=False)


class _Pair(NamedTuple):
    key: str
    caption: str
    width: int
    height: int
    phash: int


def _decoded(
    transform: Transform, key: str, content: bytes, captions: Mapping[str, Sequence[str]]
) -> tuple[_Pair, Images]:
    image, ((caption, *_),) = decode_image(content, "it"), captions.values()
    return _Pair(key, caption, image.width, image.height, perceptual_hash(image)), transform(image)


def _collate(items: list[tuple[_Pair, Images] | BadSample]) -> tuple[list[_Pair], Images, list[BadSample]]:
    good = [item for item in items if not isinstance(item, BadSample)]
    pixels = stack_images([pixels for _, pixels in good]) if good else torch.empty(0)  # (B, 3, S, S), or an `Input`
    return [pair for pair, _ in good], pixels, [item for item in items if isinstance(item, BadSample)]


def _judged(
    model: DualEncoder, index: TarIndex, judgement: Judgement, bad: BadSamples
) -> Iterator[dict[str, Sequence[Any] | np.ndarray]]:
    """The columns of each batch."""
    if judgement.language:
        try:
            import py3langid
        except ImportError as error:
            raise DataError("language needs an optional package: pip install 'coca_lit[curate]'") from error
    transform = build_transform(**model.preprocessing)  # as for an evaluation
    pairs = ShardSamples(index, [judgement.caption_key], partial(_decoded, transform))
    for batch, pixels, broken in DataLoader(
        pairs, judgement.batch_size, collate_fn=_collate, **worker_options(judgement.num_workers)
    ):
        for sample in broken:
            bad.add(sample.reason, sample.shard, sample.key, sample.detail)
        if not batch:
            continue
        captions = [pair.caption for pair in batch]
        width, height = (np.array(sides, np.int32) for sides in zip(*((p.width, p.height) for p in batch), strict=True))
        columns: dict[str, Sequence[Any] | np.ndarray] = {
            "key": [pair.key for pair in batch],
            "words": np.array([len(caption.split()) for caption in captions], np.int32),
            "characters": np.array([*map(len, captions)], np.int32),
            "width": width,
            "height": height,
            "aspect": (np.maximum(width, height) / np.minimum(width, height)).astype(np.float32),
            "phash": np.array([pair.phash for pair in batch], np.int64),
        }
        found = _scores(model, pixels, captions)
        columns |= {name: values.float().cpu().numpy() for name, values in found.items()}
        embeddings = columns.pop("embedding")
        if judgement.embeddings:
            columns["embedding"] = np.asarray(embeddings, np.float16)
        if judgement.language:  # ISO 639-1 codes
            columns["language"] = [py3langid.classify(caption)[0] for caption in captions]
        yield columns


@torch.inference_mode()
def _scores(model: DualEncoder, pixels: Images, captions: Sequence[str]) -> dict[str, Tensor]:
    """The cosine of image and text (B,), the log-likelihood of the text per token (B,) in nats if the model has a
    decoder, and the image features (B, E).
    """
    pixels, tokens = pixels.to(model.device), model.tokenizer.tokens_of(captions)
    if model.decoder is None:
        with evaluating(model):
            images = model.encode_image(pixels)
        texts = model.encode_text(tokens.to(model.device))
        return {"similarity": (images.float() * texts.float()).sum(dim=1), "embedding": images}
    lengths = text_lengths(tokens, model.tokenizer.pad_id)
    out = model(pixels, tokens.to(model.device), lengths)
    totals, counts = log_likelihoods(out, lengths)
    similarity = (out.image_features.float() * out.text_features.float()).sum(dim=1)
    return {"similarity": similarity, "likelihood": totals / counts.clamp(min=1), "embedding": out.image_features}

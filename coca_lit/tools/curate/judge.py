"""Judging pairs: what a model and the pixels say about each sample of a shard, as Parquet beside the shard.

Samples are read and decoded as a training does: what counts as broken here is what it would skip. A file is complete
or absent, and a repeated command skips the shards that have one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coca_lit.data.bad_samples import BadSample, BadSampleError, BadSamples, LostShardError
from coca_lit.data.near_duplicates import perceptual_hash
from coca_lit.data.pixels import decode_image
from coca_lit.data.prefetch import worker_errors, worker_options
from coca_lit.data.shards.index import TarIndex, load_index, make_index
from coca_lit.data.shards.sample import pair_of
from coca_lit.data.shards.shard import Shard, read_manifest
from coca_lit.data.transforms import Transform, build_transform
from coca_lit.errors import DataError, error_context
from coca_lit.evals.inference import evaluating
from coca_lit.files import claim, size_and_time
from coca_lit.machine import best_device
from coca_lit.models import DualEncoder, text_lengths
from coca_lit.models.inputs import Images, stack_images
from coca_lit.models.likelihood import log_likelihoods
from coca_lit.tools.curate.scores import SETTINGS, check_source, read_about, scores_path, write_scores
from coca_lit.weights.computation import fingerprint
from coca_lit.weights.load import load_dual_encoder


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


class JudgedShard(NamedTuple):
    """The result for one shard."""

    path: Path  # of the Parquet file
    samples: int  # in it
    bad: dict[str, int]  # number of samples left out, by reason
    examples: list[str]  # the first few of them, with what is wrong
    skipped: bool  # whether the file was there already


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
        "model": load_judge(judgement.checkpoint, judgement.bf16)[1],
        "precision": "bf16, similarities in fp32" if judgement.bf16 else "fp32",
        "caption_key": judgement.caption_key,
        "embeddings": judgement.embeddings,
        "language": judgement.language,
    }


def judge_shard(shard: Path, judgement: Judgement) -> JudgedShard:
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
            return JudgedShard(path, known["samples"], known["bad"], known["examples"], skipped=True)
        check_source(path, known, shard)
    model, _ = load_judge(judgement.checkpoint, judgement.bf16)
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
    return JudgedShard(path, len(columns["key"]) if columns else 0, **left_out, skipped=False)


def index_of(shard: Path, folder: Path, bad: BadSamples) -> TarIndex:
    """The index of a shard, the one that a training uses; adds its faults to `bad`."""
    listed = Shard(str(shard), read_manifest(shard.parent).get(shard.name))
    index = load_index(listed, folder) or make_index(listed, folder)
    for fault in index.faults:
        bad.add(fault.reason, fault.shard, fault.key, fault.detail)
    return index


class ShardSamples(Dataset[Any]):
    """The samples of a shard: what a function makes of key, encoded image and captions, or what is wrong with it."""

    def __init__(self, index: TarIndex, caption_keys: Sequence[str], of_sample: Callable[..., Any]) -> None:
        self.index, self.caption_keys, self.of_sample = index, caption_keys, of_sample

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Any:
        shard, key = self.index.shard.name, self.index.key(i)
        try:
            return self.of_sample(key, *pair_of(self.index.read(i), self.caption_keys, shard))
        except LostShardError as error:  # the file would lack the rest of the shard for ever
            lost = error.sample
            raise DataError(f"{lost.shard}: {lost.detail or lost.reason}: start again, or leave it out") from error
        except BadSampleError as error:
            return error.sample
        except DataError as error:
            return BadSample(shard, key, "unreadable image", str(error))


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
    pixels = stack_images([pixels for _, pixels in good]) if good else torch.empty(0)  # (B, 3, S, S), or patches
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
        images: Tensor = evaluating(model, model.encode_image, pixels)
        texts = model.encode_text(tokens.to(model.device))
        return {"similarity": (images.float() * texts.float()).sum(dim=1), "embedding": images}
    lengths = text_lengths(tokens, model.tokenizer.pad_id)
    out = model(pixels, tokens.to(model.device), lengths)
    totals, counts = log_likelihoods(out, lengths)
    similarity = (out.image_features.float() * out.text_features.float()).sum(dim=1)
    return {"similarity": similarity, "likelihood": totals / counts.clamp(min=1), "embedding": out.image_features}


@lru_cache(maxsize=8)  # for all shards that this process judges
def load_judge(checkpoint: str, bf16: bool) -> tuple[DualEncoder, str]:
    """A model that says what it thinks of data, and the fingerprint of its weights in the file."""
    with error_context("checkpoint"):
        model = load_dual_encoder(checkpoint)
    made_by = fingerprint(model)
    return model.to(torch.bfloat16 if bf16 else None), made_by

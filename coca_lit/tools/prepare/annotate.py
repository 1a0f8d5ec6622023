"""Files beside shards that say what models think of their samples: how the samples are read for them, and whether a
file belongs to its shard. Samples are read and decoded as a training does: what counts as broken here is what it would
skip.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from coca_lit.data.bad_samples import BadSample, BadSampleError, BadSamples, LostShardError
from coca_lit.data.shards.index import TarIndex, load_index, make_index
from coca_lit.data.shards.sample import pair_of
from coca_lit.data.shards.shard import Shard, read_manifest
from coca_lit.errors import DataError, error_context
from coca_lit.models import DualEncoder
from coca_lit.tools.claims import is_of_another
from coca_lit.weights.computation import fingerprint
from coca_lit.weights.load import load_dual_encoder


class AnnotatedShard(NamedTuple):
    """The result for one shard."""

    path: Path  # of the file beside it
    samples: int  # in it
    bad: dict[str, int]  # number of samples left out, by reason
    examples: list[str]  # the first few of them, with what is wrong
    skipped: bool  # whether the file was there already


def check_shards(shards: Sequence[Path], folder: Path | None = None) -> None:
    """Raises `DataError` for a shard that is not an uncompressed .tar, and for two whose outputs would be one file.

    Args:
        folder: of the outputs; None for that of each shard.
    """
    owners: dict[Path, Path] = {}
    for shard in shards:
        if shard.suffix != ".tar":
            raise DataError(f"{shard} is not an uncompressed .tar file: decompress it first")
        path = (folder or shard.parent) / shard.name
        if owners.setdefault(path, shard) != shard:
            raise DataError(f"{owners[path]} and {shard} have one name: give each set an output of its own")


def check_source(path: Path, about: Mapping[str, Any], shard: Path) -> None:
    """Raises `DataError` if a file was made of another shard of this name that is still there, unless it was copied
    with its shard.
    """
    made = str(about.get("source", ""))
    is_beside = path.parent.resolve() == shard.parent.resolve()
    if is_beside and os.path.exists(os.path.join(os.path.dirname(made), path.name)):
        return
    if is_of_another(made, shard):
        raise DataError(f"{path} was made of {made}: choose another output for {shard}")


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
        self.index = index
        self.caption_keys = caption_keys
        self.of_sample = of_sample

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Any:
        shard = self.index.shard.name
        key = self.index.key(i)
        try:
            return self.of_sample(key, *pair_of(self.index.read(i), self.caption_keys, shard))
        except LostShardError as error:  # the file would lack the rest of the shard for ever
            lost = error.sample
            raise DataError(f"{lost.shard}: {lost.detail or lost.reason}: start again, or leave it out") from error
        except BadSampleError as error:
            return error.sample
        except DataError as error:
            return BadSample(shard, key, "unreadable image", str(error))


@lru_cache(maxsize=8)  # for all shards that this process annotates
def load_annotator(checkpoint: str, bf16: bool) -> tuple[DualEncoder, str]:
    """A model that annotates, and the fingerprint of its weights in the file."""
    with error_context("checkpoint"):
        model = load_dual_encoder(checkpoint)
    made_by = fingerprint(model)
    return model.to(torch.bfloat16 if bf16 else None), made_by

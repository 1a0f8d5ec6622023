"""What the frozen stages of an image encoder give, computed once: training then skips them, most of the work of a small
captioner.

What is lost is fresh augmentation in every epoch, so several views of each image can be encoded: the image itself, its
mirror image, then random crops. Every view is one memory-mapped file in fp16, whole or not there, so a run that is
killed while it encodes loses one view at most.
"""

import functools
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from coca_lit.data.pixels import load_pixels
from coca_lit.data.records import Record
from coca_lit.data.transforms import TrainTransform, Transform
from coca_lit.distributed import gather_objects, print_rank_zero, rank, world_size
from coca_lit.errors import DataError
from coca_lit.files import replacing
from coca_lit.progress import ProgressBar
from coca_lit.seeding import stable_seed
from coca_lit.weights.digest import digest

BATCH = 32  # images that are encoded at a time
BYTES = 2  # of a number in fp16
SIDES = {"left": "right", "right": "left"}


class FeatureCache:
    """Image tokens (S, C) of every record, view by view, in files of one folder per encoder and way of making views.

    Args:
        folder: where the folders of all encoders lie; every process of a run must see the same.
        encoder: pixels (B, 3, H, W) -> tokens (B, S, C); frozen, and all or the beginning of the network's.
        plain: what an evaluation does to an image.
        crop: what training does to it.
        precision: makes the context in which the encoder runs while training, such as autocast.
        name_of_precision: tells one such context from another.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: nn.Module,
        plain: Transform,
        crop: TrainTransform,
        seed: int,
        precision: Callable[[], AbstractContextManager] = nullcontext,
        name_of_precision: str = "",
    ) -> None:
        if any(p.requires_grad for p in encoder.parameters()):
            raise DataError(
                "data.cached_augmentations stores the output of the image encoder, but this encoder is trained and its "
                "output will change: freeze it (model.freeze=[image_encoder]), or its first stages, or set "
                "data.cached_augmentations=0"
            )
        tensors = chain(encoder.named_parameters(), encoder.named_buffers())
        about = (repr(encoder), _describe(plain), _describe(crop), seed, name_of_precision)
        self.folder = Path(folder) / digest(repr(about), tensors)
        self.encoder, self.plain, self.crop, self.seed, self.precision = encoder, plain, crop, seed, precision

    def encode(self, records: Sequence[Record], count: int, num_workers: int, device: torch.device) -> list[Path]:
        """The files of `count` views of the records, those that are missing encoded now, dealt out to the processes.

        Files are found again by the ids and sources of the records: delete the folder if images change under the same
        names.

        Raises:
            DataError: nothing can be written, or there is no room; on all processes.
        """
        name = stable_seed("records", *(pickle.dumps((record.id, record.image)).hex() for record in records))
        paths = [self.folder / f"{name:016x}_{view}.npy" for view in range(count)]
        missing = [(view, path) for view, path in enumerate(paths) if not path.exists()]
        reason = None
        if missing:
            print_rank_zero(
                f"encoding {len(missing)} views of {len(records)} images, once and for all runs, into {self.folder}"
            )
            try:
                for view, path in missing:
                    if view % world_size() == rank():
                        self._write(path, view, records, num_workers, device)
            except DataError as error:
                reason = str(error)
        if reasons := [found for found in gather_objects(reason) if found]:
            raise DataError(reasons[0])
        if absent := [path for path in paths if not path.exists()]:
            raise DataError(f"{absent[0]} is not there: data.cache_dir must be a folder that all processes see")
        return paths

    def _write(self, path: Path, view: int, records: Sequence[Record], num_workers: int, device: torch.device) -> None:
        where = next(self.encoder.parameters()).device
        try:
            with replacing(path) as temporary, temporary.open("wb") as file, ProgressBar(f"view {view}") as progress:
                for done, tokens in self._tokens(view, records, num_workers, device):
                    if file.tell() == 0:
                        _begin(file, path.parent, (len(records), *tokens.shape[1:]))
                    file.write(tokens.numpy().tobytes())
                    progress.reach(done, len(records))
        finally:
            self.encoder.to(where)

    @torch.no_grad()
    def _tokens(
        self, view: int, records: Sequence[Record], num_workers: int, device: torch.device
    ) -> Iterator[tuple[int, Tensor]]:
        """(images done, their tokens (b, S, C) in fp16); those of an image that cannot be decoded are NaN."""
        encoder, done = self.encoder.to(device).eval(), 0
        pixels = _Pixels(records, functools.partial(self._view, view))
        blank = self.plain(Image.new("RGB", (32, 32)))
        for batch in DataLoader(pixels, BATCH, num_workers=num_workers, collate_fn=list):
            broken = [i for i, image in enumerate(batch) if image is None]
            images = torch.stack([blank if image is None else image for image in batch])  # (b, 3, H, W)
            with self.precision():
                tokens = encoder(images.to(device, memory_format=torch.channels_last)).half().cpu()  # (b, S, C)
            tokens[broken] = torch.nan
            done += len(batch)
            yield done, tokens

    def _view(self, view: int, record: Record) -> Tensor:
        if view < 2:
            pixels = self.plain(record.image())
        else:
            rng = random.Random(stable_seed("view", self.seed, view, record.id))
            pixels = self.crop(load_pixels(record.image), rng)
        return pixels.flip(-1) if is_mirrored(view) else pixels


def is_mirrored(view: int) -> bool:
    return view % 2 == 1


def mirrored(caption: str) -> str:
    """The caption of the mirror image: left is right."""
    return re.sub(r"\b(left|right)\b", lambda word: SIDES[word[0].lower()], caption, flags=re.IGNORECASE)


def read_tokens(path: Path, i: int) -> Tensor:
    """Tokens (S, C) of record i, fp16; raises `DataError` if its image could not be decoded."""
    tokens = torch.from_numpy(np.array(_map(path)[i]))
    if tokens[0, 0].isnan():
        raise DataError(f"image {i} could not be decoded when {path} was written")
    return tokens


@functools.lru_cache(maxsize=64)
def _map(path: Path) -> np.ndarray:
    """Opened where it is read: what is mapped would travel to another process as a copy of all of it."""
    return np.load(path, mmap_mode="r")


def _begin(file: IO[bytes], folder: Path, shape: tuple[int, ...]) -> None:
    """NumPy's header, if what follows has room."""
    needed, free = BYTES * int(np.prod(shape)), shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"a view takes {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB left: name another disk with "
            "data.cache_dir, or set data.cached_augmentations=0"
        )
    np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})


def _describe(transform: Transform | TrainTransform) -> str:
    """Its steps without the addresses of functions."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(transform))


class _Pixels(Dataset[Tensor | None]):
    """Pixels of each record, None for those that cannot be decoded."""

    def __init__(self, records: Sequence[Record], transform: Callable[[Record], Tensor]) -> None:
        self.records, self.transform = records, transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Tensor | None:
        try:
            return self.transform(self.records[i])
        except DataError:
            return None

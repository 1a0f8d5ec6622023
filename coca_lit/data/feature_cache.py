"""Caches the output of the frozen stages of an image encoder, so that training skips them: most of the work of a small
captioner.

The price is augmentation that no longer differs between epochs, so several views of each image can be encoded: the
image itself, its mirror image, then random crops, every other one mirrored. In the captions of a mirror image left and
right are swapped, which needs English: other captions get no mirror images. Each view of all images is one
memory-mapped file in fp16, complete or absent, so a run that is killed while encoding loses one view at most.
"""

import functools
import inspect
import logging
import pickle
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import DataLoader

from coca_lit.data.examples import CaptionDataset, FirstCaptionDataset, Index
from coca_lit.data.prefetch import worker_options
from coca_lit.data.records import Record
from coca_lit.data.sources import BLANK, ImageSource, TrainTransform, Transform
from coca_lit.data.transforms import augmented, build_transform, loaded, whole
from coca_lit.data.view_folder import use
from coca_lit.distributed import broadcast_object, gather_objects, print_rank_zero, rank, stable_seed, world_size
from coca_lit.errors import DataError
from coca_lit.files import replacing
from coca_lit.models.inputs import Images, Input, joined, stack_images
from coca_lit.progress import ProgressBar
from coca_lit.reading import may_pass, printable
from coca_lit.tokenizer import Tokenizer, split_words
from coca_lit.weights.intact import digest

log = logging.getLogger(__name__)

BATCH = 32  # images that are encoded at a time
BYTES = 2  # of a number in fp16
GONE = (404, 410)  # statuses of HTTP
STABLE = ("builtins", "coca_lit", "timm", "torch", "torchvision")  # packages that nobody edits between two runs
SIDES = {"left": "right", "right": "left"}
OF_PLACES = re.compile(  # "on the left", "left of it", "left and right", but not "he left the room", "right behind him"
    r"\b((?:the|his|her|its|their|my|your|our|far|upper|lower|top|bottom|front|back|rear|on|at|to|from|facing|looking"
    r"|turning|pointing|leaning|towards?)\s)(left|right)(?:(\s(?:and|or|to)\s|-to-)(left|right))?\b"
    r"|\b(left|right)(\s(?:and|or|to)\s|-to-)(left|right)\b"
    r"|\b(left|right)(?=-?(?:most|hand|handed|wards?)\b)"
    r"|\b(left|right)(?=(?:\s|-)(?:of|side|hand|handed|half|corner|edge|end|arm|leg|foot|paw|ear|eye|wing)\b)"
    r"|\A(left|right)\Z",
    re.IGNORECASE,
)
OF_SIDES = re.compile(r"\b(?:left|right)\b", re.IGNORECASE)
ENGLISH = frozenset(["and", "of", "the", "with"])  # words that other languages do not have
MOST_ONE_SIDED = 0.01  # share of texts
LEAST_ENGLISH = 0.04  # share of these words; 0.096 in captions of Flickr8k


class _Unread(NamedTuple):
    reason: str
    may_pass: bool  # another attempt may read it: it is the disk, the rights or a package that is missing


class FeatureCache:
    """Features (S, C) of every record, for a clip of all its frames (F · S, C), one file per view, in one folder per
    encoder and augmentation.

    Args:
        folder: of the caches of all encoders; every process of a run must see the same.
        encoder: pixels (B, 3, H, W) -> features (B, S, C); the network's image encoder or its first stages, frozen.
        plain: transform of evaluations.
        crop: transform of training.
        precision: makes the context in which the encoder runs during training, such as autocast.
        precision_name: tells such contexts apart.
        arguments: of the encoder, which may decide what it computes and show neither in its parts nor in its tensors.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: nn.Module,
        plain: Transform,
        crop: TrainTransform,
        seed: int,
        precision: Callable[[], AbstractContextManager] = nullcontext,
        precision_name: str = "",
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if any(p.requires_grad for p in encoder.parameters()):
            raise DataError("data.cached_augmentations needs a frozen encoder: set model.freeze=[image_encoder]")
        tensors = chain(encoder.named_parameters(), encoder.named_buffers())
        about: tuple[object, ...] = (repr(encoder), _describe(plain), _describe(crop), seed, precision_name)
        about += ((sorted(arguments.items()),) if arguments else ()) + _foreign_code(encoder)
        self.folder = Path(folder) / digest(repr(about), tensors)
        self.encoder = encoder
        self.plain = plain
        self.crop = crop
        self.seed = seed
        self.precision = precision

    def __getstate__(self) -> dict[str, Any]:
        """For a spawned data worker, which only decodes: the encoder may be on a device that shares no memory."""
        return self.__dict__ | {"encoder": None, "precision": None}

    def encode(
        self, records: Sequence[Record], count: int, num_workers: int, device: torch.device, trained: bool = True
    ) -> list[Path]:
        """The files of `count` views of the records; missing ones are encoded now, split over the processes.

        Files are named after the ids and sources of the records, and after the size and time of image files: a photo
        that is replaced under its name is encoded again, with all others.

        Args:
            trained: a broken image is left out, as training replaces it; otherwise it is an error.

        Raises:
            DataError: nothing can be written, or the disk has no room; on all processes. Or there are no records, or
                one has several images.
        """
        if not records:
            raise DataError("there are no images whose features can be cached: the split is empty, set another one")
        several = [record.id for record in records if record.further]
        if several:
            raise DataError(
                f"features are cached of one image a record, and {several[0]!r} has more: set cached_augmentations=0"
            )
        named = ((record.id, record.image) for record in records)
        files = ((i, x, *x.state()) if isinstance(x, ImageSource) else (i, x) for i, x in named)
        name = broadcast_object(stable_seed("records", *(pickle.dumps(source).hex() for source in files)))
        views = view_numbers(records, count)
        if count > 1 and views[1] > 1:
            print_rank_zero("no mirror images: the captions are not in English, or name sides that cannot be swapped")
        paths = [self.folder / f"{name:016x}_{view}.npy" for view in views]
        missing = [path for path in paths if not path.exists()]
        reason = None
        if missing:
            print_rank_zero(
                f"encoding {len(missing)} views of {len(records)} images into {self.folder}, once for all runs"
            )
            try:
                own = zip(views[rank() :: world_size()], paths[rank() :: world_size()], strict=True)
                wanted = [(view, path) for view, path in own if path in missing]
                with ProgressBar("encoding") as progress:
                    for done, (view, path) in enumerate(wanted):
                        total = len(wanted) * len(records)
                        before = done * len(records)
                        self._write(path, view, records, num_workers, device, trained, progress, before, total)
            except DataError as error:
                reason = str(error)
        reasons = [found for found in gather_objects(reason) if found]
        if reasons:
            raise DataError(reasons[0])
        absent = [path for path in paths if not path.exists()]
        if absent:
            raise DataError(f"{absent[0]} is not there: data.cache_dir must be a folder that all processes see")
        if rank() == 0:
            use(self.folder)
        return paths

    def _write(
        self,
        path: Path,
        view: int,
        records: Sequence[Record],
        num_workers: int,
        device: torch.device,
        trained: bool,
        progress: ProgressBar,
        before: int,
        total: int,
    ) -> None:
        """Writes one view. Of `total` images to encode, `before` were encoded for other views."""
        device_before = next(self.encoder.parameters()).device
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                for done, features in self._features(view, records, num_workers, device, trained):
                    if file.tell() == 0:
                        _write_header(file, path.parent, (len(records), *features.shape[1:]))
                    file.write(features.numpy().tobytes())
                    progress.reach(before + done, total)
        finally:
            self.encoder.to(device_before)

    @torch.no_grad()
    def _features(
        self, view: int, records: Sequence[Record], num_workers: int, device: torch.device, trained: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """(images done so far, features (b, S, C) of the last batch in fp16); NaN for an image that is broken.

        Raises `DataError` for one that another attempt may read: what is written stays for all later runs.
        """
        encoder = self.encoder.to(device).eval()
        done = 0
        first = records[0].image
        blank = first.blank(self.plain) if isinstance(first, ImageSource) else self.plain(Image.new("RGB", BLANK))
        read = functools.partial(self._read, view)
        for batch in DataLoader(records, BATCH, collate_fn=read, **worker_options(num_workers)):  # type: ignore[arg-type]
            broken = [i for i, image in enumerate(batch) if isinstance(image, _Unread)]
            for i in broken:
                name = printable(str(records[done + i].id))
                if batch[i].may_pass or not trained:
                    raise DataError(f"{name}: {batch[i].reason}")
                if view == 0:
                    log.warning("%s is left out of training: %s", name, batch[i].reason)
            images = stack_images([blank if isinstance(image, _Unread) else image for image in batch]).to(device)
            if isinstance(images, Tensor):  # (b, 3, H, W)
                images = images.contiguous(memory_format=torch.channels_last)
            with self.precision():
                features = joined(encoder(images)).half().cpu()  # (b, S, C)
            features[broken] = torch.nan
            done += len(batch)
            yield done, features

    def _read(self, view: int, records: Sequence[Record]) -> list[Images | _Unread]:
        """Pixels of each record, or why there are none."""
        return [self._view(view, record) for record in records]

    def _view(self, view: int, record: Record) -> Images | _Unread:
        try:
            if view < 2:
                pixels = loaded(record.image, self.plain)
            else:
                rng = random.Random(stable_seed("view", self.seed, view, record.id))
                pixels = augmented(record.image, self.crop, rng)
        except DataError as error:
            cause = error.__cause__
            passes = isinstance(cause, ImportError)
            if isinstance(record.image, ImageSource) and record.image.is_file:  # whose state names the cache
                passes |= may_pass(cause) and not isinstance(cause, FileNotFoundError)
            elif isinstance(cause, OSError):  # what a network or a disk says has a number or a class of its own
                gone = getattr(cause, "code", getattr(getattr(cause, "response", None), "status_code", 0)) in GONE
                passes |= may_pass(cause) or (type(cause) not in (OSError, UnidentifiedImageError) and not gone)
            return _Unread(str(error), passes)
        if not is_mirrored(view):
            return pixels
        return pixels.mirrored() if isinstance(pixels, Input) else pixels.flip(-1)


def view_numbers(records: Sequence[Record], count: int) -> range:
    """Of `count` views; without the mirror images where sentences are not in English, or where shorter texts, such as
    labels, name a side that `swap_sides` leaves: "turn left". A sentence has three words, or is in a script that may
    not separate them.
    """
    texts = [split_words(text) for record in records for text in (*record.captions, record.question) if text]
    sentences = [len(text) >= 3 or not any(map(str.isascii, "".join(text))) for text in texts]
    words = [word for text, is_sentence in zip(texts, sentences, strict=True) if is_sentence for word in text]
    english = sum(word in ENGLISH for word in words) >= LEAST_ENGLISH * len(words)
    labels = [" ".join(text) for text, is_sentence in zip(texts, sentences, strict=True) if not is_sentence]
    one_sided = sum(bool(SIDES.keys() & {*label.split()}) and swap_sides(label) == label for label in labels)
    return range(count) if english and one_sided <= MOST_ONE_SIDED * len(texts) else range(0, 2 * count, 2)


def _view_number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def is_mirrored(view: int) -> bool:
    return view % 2 == 1


def mirrored(record: Record) -> Record:
    """With the texts of the mirror image: left and right swapped."""
    captions = tuple(map(swap_sides, record.captions))
    return record._replace(captions=captions, question=swap_sides(record.question))


def swap_sides(text: str) -> str:
    """What is said of an image, said of its mirror image: left and right are swapped in English phrases of places.

    Idioms with the words of such a phrase are swapped too: "on the right track" cannot be told from a place. Other
    words stay, such as "looks right" or "LEFT a dog, right a cat"; see `has_unclear_side`.
    """
    return OF_PLACES.sub(lambda found: "".join(SIDES.get(p.lower(), p) for p in found.groups(default="")), text)


def has_unclear_side(record: Record) -> bool:
    """Whether `swap_sides` leaves a left or right in a text: a side or not ("he left"), so its mirror image may be
    described wrongly.
    """
    return any(OF_SIDES.search(OF_PLACES.sub("", text)) for text in (*record.captions, record.question))


def read_features(path: Path, i: int) -> Tensor:
    """Features (S, C) of record i, fp16; raises `DataError` if its image could not be decoded."""
    features = torch.from_numpy(np.array(_map(path)[i]))
    if features[0, 0].isnan():
        raise DataError(f"image {i} could not be decoded when {path} was written: repair it, or leave it out")
    return features


@functools.lru_cache(maxsize=64)
def _map(path: Path) -> np.ndarray:
    """Opened in the process that reads it: sending a map to another process would copy all of its content."""
    try:
        features = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} holds no features: remove it, and they are encoded again ({error})") from error
    if features.dtype != np.float16 or features.ndim != 3:
        raise DataError(f"{path} holds other values than features: remove it, and they are encoded again")
    return features


def _write_header(file: IO[bytes], folder: Path, shape: tuple[int, ...]) -> None:
    """NumPy's header; raises `DataError` if the disk has no room for the array."""
    needed = BYTES * int(np.prod(shape))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"a view takes {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB left: set another data.cache_dir"
        )
    np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})


def _foreign_code(encoder: nn.Module) -> tuple[str, ...]:
    """The sources of its classes from outside and of their modules: they may be edited."""
    kinds = {kind for part in encoder.modules() for kind in type(part).__mro__}
    foreign = {kind for kind in kinds if kind.__module__.split(".")[0] not in STABLE}
    modules = {kind.__module__ for kind in foreign}
    found: list[Any] = [*foreign, *map(sys.modules.get, modules)]
    sources: list[str] = []
    for of in found:
        with suppress(OSError, TypeError):  # of a notebook
            sources.append(inspect.getsource(of))
    return tuple(sorted(sources))


def _describe(transform: Transform | TrainTransform) -> str:
    """Its `repr` without memory addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(transform))


class CachedCaptionDataset(CaptionDataset):
    """Training examples with cached features of a random view of each image, drawn with the seed of the caption. A view
    that is no mirror image where a text has an unclear side.

    Args:
        views: files of `FeatureCache`.
    """

    def __init__(
        self, records: Sequence[Record], views: Sequence[Path], tokenizer: Tokenizer, seed: int = 0, captions: int = 1
    ) -> None:
        super().__init__(records, whole, tokenizer, seed, captions)
        self.views = views
        self._as_taken = [path for path in views if not is_mirrored(_view_number(path))]

    def image(self, index: Index, record: Record, rng: random.Random) -> tuple[Tensor, Record]:
        views = self._as_taken if has_unclear_side(record) else self.views
        view = views[rng.randrange(len(views))]
        return read_features(view, index.i), mirrored(record) if is_mirrored(_view_number(view)) else record


class CachedFirstCaptionDataset(FirstCaptionDataset):
    """Validation examples with cached features in place of pixels; `view` is the file of the unaugmented images."""

    def __init__(self, records: Sequence[Record], view: Path, tokenizer: Tokenizer, captions: int = 1) -> None:
        super().__init__(records, build_transform(), tokenizer, captions)  # there are no further images to transform
        self.view = view

    def _image(self, i: int) -> Tensor:
        try:
            return read_features(self.view, i)
        except DataError as error:
            raise DataError(f"{printable(str(self.records[i].id))}: {error}") from error

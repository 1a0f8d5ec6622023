"""Searching images by text or by image: the embeddings of a folder, computed once and kept in one file.

The file holds the path in the folder, size, modification time and embedding of each image, so that an update embeds
only new and changed images; and the fingerprint of the model, because embeddings of two models cannot be compared.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from coca_lit import extensions
from coca_lit.data.inputs import reader_of
from coca_lit.data.pixels import SUFFIXES
from coca_lit.data.prefetch import worker_errors
from coca_lit.data.transforms import build_transform, loaded
from coca_lit.errors import DataError
from coca_lit.evals.inference import evaluating
from coca_lit.files import replacing, state_of
from coca_lit.models import DualEncoder
from coca_lit.progress import ProgressBar
from coca_lit.tokenizer import Tokenizer, unknown_words
from coca_lit.tools.caption.inputs import find_images, in_batches, load_images
from coca_lit.weights.computation import fingerprint

FORMAT = "coca_lit image index 1"
DTYPES = {"folder": torch.uint8, "names": torch.uint8, "stamps": torch.int64, "features": torch.float32}
SAVE_EVERY = 300.0  # seconds
Progress = Callable[[int, int], None]  # images done so far, images to do


def readable_endings(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The endings of images, and of the declared kinds whose options are given and not 0."""
    wanted = {option.reader for name, option in extensions.input_options().items() if options.get(name)}
    others = [ending for ending, target in extensions.declared("inputs").items() if target in wanted]
    return (*SUFFIXES, *others)


class Hit(NamedTuple):
    """A found image."""

    score: float  # cosine of query and image
    path: Path


Stamp = tuple[int, int]  # size in bytes and modification time in nanoseconds, which reveal a changed file


class Changes(NamedTuple):
    """What an update found in the folder."""

    added: list[Path]
    changed: list[Path]
    removed: list[Path]  # from the index: also those that can no longer be read
    unreadable: dict[Path, str]  # with the reason; not in the index, tried again next time


def index_file(folder: Path) -> Path:
    """Where the index of a folder of images is kept: beside the folder."""
    whole = Path(os.path.abspath(folder))  # also of ".."
    return whole.with_name(f"{whole.name}.index.safetensors")


class ImageIndex:
    """An index of the images in `folder` for `model`, empty until `update`.

        index = ImageIndex(model, "photos")
        index.update()
        index.save("photos.safetensors")

        index = ImageIndex.load("photos.safetensors", model)
        for score, path in index.query("a dog on a beach", k=10): ...

    Args:
        model: embeds images and queries, on its device. It must not be trained meanwhile.
        folder: searched with its subfolders.
        options: of other kinds of input than images, see `readable_endings`; without any they are left out.
    """

    def __init__(self, model: DualEncoder, folder: str | Path, options: Mapping[str, Any] | None = None) -> None:
        self.model = model
        self.folder = Path(folder)
        self.options = dict(options or {})
        self.fingerprint = fingerprint(model)
        self.features = torch.empty(0, 0)  # (I, E), of unit length, on the CPU
        self._stamps: dict[str, Stamp] = {}  # path in the folder -> stamp, in the order of the features

    @classmethod
    def load(cls, path: str | Path, model: DualEncoder) -> "ImageIndex":
        """Reads a file that `save` wrote.

        Raises:
            DataError: there is no such file, it is not an index, or another model made it.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"there is no index '{path}'")
        made_by = _format(path)
        try:
            tensors = load_file(path)
        except Exception as error:
            raise DataError(f"'{path}' is not a readable image index: {error}") from error
        if {name: tensor.dtype for name, tensor in tensors.items()} != DTYPES:
            raise DataError(f"'{path}' is damaged: delete it, and the next search builds it")
        index = cls(model, path.parent / _text(tensors["folder"]))
        if made_by != index.fingerprint:
            raise DataError(f"{path} was made with another model: delete it, or search with that model")
        names = _text(tensors["names"]).split("\0")[:-1]
        stamps = tensors["stamps"]
        features = tensors["features"]
        fits = stamps.shape == (len(names), 2) and features.ndim == 2 and len(features) == len(names)
        if not fits or any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
            raise DataError(f"'{path}' is damaged: delete it, and the next search builds it")
        index._stamps = {name: (size, time) for name, (size, time) in zip(names, stamps.tolist(), strict=True)}
        # Not a view of the mapped file where that could then not be replaced.
        index.features = features.clone() if os.name == "nt" else features
        return index

    def save(self, path: str | Path) -> None:
        """Writes the index atomically. An index and its folder can be moved together.

        Raises:
            DataError: a file of another kind is there, or nothing can be written.
        """
        path = Path(path)
        if path.exists():
            _format(path)
        beside, folder = Path(os.path.abspath(path)).parent, Path(os.path.abspath(self.folder))  # without ".."
        reference = folder.relative_to(beside) if folder.is_relative_to(beside) else folder
        tensors = {
            "folder": _bytes(str(reference)),
            "names": _bytes("".join(f"{name}\0" for name in self._stamps)),
            "stamps": torch.tensor([*self._stamps.values()], dtype=torch.long).reshape(-1, 2),
            "features": self.features,
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "model": self.fingerprint})

    def update(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        progress: Progress | None = None,
        save: Callable[[], None] | None = None,
    ) -> Changes:
        """Brings the index up to date with the folder: embeds new and changed images, forgets removed ones. A file
        counts as changed if its size or modification time differs.

        Args:
            num_workers: processes that decode images ahead of the model.
            progress: called after every batch.
            save: called every `SAVE_EVERY` seconds, when the index has what is embedded so far.

        Raises:
            DataError: there is no such folder, or no readable image in it.
        """
        suffixes = readable_endings(self.options)
        paths = {str(path.relative_to(self.folder)): path for path in find_images(self.folder, suffixes)}
        stamps = {name: _stamp(path, self.options) for name, path in paths.items()}
        before = self._stamps
        changed = [name for name, stamp in before.items() if stamps.get(name, stamp) != stamp]
        rows = {name: row for name, row in zip(before, self.features, strict=True) if stamps.get(name) == before[name]}
        added = [name for name in paths if name not in before]
        names = {paths[name]: name for name in (*added, *changed)}
        failed: dict[str, str] = {}

        def keep() -> None:
            if rows:
                self._stamps = {name: stamps[name] for name in paths if name in rows}
                self.features = torch.stack([rows[name] for name in self._stamps])

        saved = time.monotonic()
        try:
            for done, unreadable in self._embed([*names], batch_size, num_workers):
                rows |= {names[path]: row for path, row in done.items()}
                failed |= {names[path]: reason for path, reason in unreadable.items()}
                if progress:
                    progress(len(rows) + len(failed) + len(names) - len(paths), len(names))
                if save and time.monotonic() - saved > SAVE_EVERY:
                    keep()
                    save()
                    saved = time.monotonic()
        finally:  # what is embedded can be saved if it is interrupted
            keep()
        if not rows:
            found = f"no readable image in '{self.folder}', e.g. {next(iter(failed.values()))}" if failed else ""
            raise DataError(found or f"no image in '{self.folder}' (looked for {', '.join(suffixes)})")
        return Changes(
            [paths[name] for name in added if name in rows],
            [paths[name] for name in changed if name in rows],
            [self.folder / name for name in before if name not in rows],
            {paths[name]: reason for name, reason in failed.items()},
        )

    def query(
        self, query: str | Image.Image | Callable[[], Image.Image], k: int = 10, without: Path | None = None
    ) -> list[Hit]:
        """The `k` images most similar to a text or an image, best first.

        Args:
            query: a text, an image, or what loads one, such as an `ImageSource`.
            without: a file that is not to be found, such as the query itself.

        Raises:
            ValueError: `k` is less than 1, or `check_query` refuses the text.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not isinstance(query, str):
            load = (lambda: query) if isinstance(query, Image.Image) else query
            encode: Callable[..., Tensor] = self.model.encode_image
            encoded = loaded(load, build_transform(**self.model.preprocessing))[None]
        else:
            check_query(self.model.tokenizer, query)
            encode = self.model.encode_text
            encoded = self.model.tokenizer(query)
        if not self._stamps:
            return []
        with evaluating(self.model):
            vector = encode(encoded.to(self.model.device))[0].float().cpu()
        scores = self.features @ vector  # (I,)
        best = scores.argsort(descending=True, stable=True)[: k + 1].tolist()
        paths = self.paths
        left_out = without.resolve() if without else None
        return [Hit(float(scores[i]), paths[i]) for i in best if paths[i].resolve() != left_out][:k]

    @property
    def paths(self) -> list[Path]:
        """The images in the index, in the order of `features`."""
        return [self.folder / name for name in self._stamps]

    def __len__(self) -> int:
        return len(self._stamps)

    def _embed(
        self, paths: list[Path], batch_size: int, num_workers: int
    ) -> Iterator[tuple[dict[Path, Tensor], dict[Path, str]]]:
        """Of each batch the embeddings (E,) by path, and the reasons why images have none."""
        batches = in_batches(paths, batch_size, self.options)
        images = load_images(batches, self.model.preprocessing, num_workers)
        for sources, (positions, pixels, broken) in zip(batches, images, strict=True):
            features: dict[Path, Tensor] = {}
            if positions:
                with evaluating(self.model):
                    rows = self.model.encode_image(pixels.to(self.model.device)).float().cpu()
                features = {sources[i].path: row for i, row in zip(positions, rows, strict=True)}
            yield features, {sources[i].path: reason for i, reason in broken.items()}


def refresh(index: ImageIndex, save: Callable[[], None], batch_size: int = 64, num_workers: int = 0) -> Changes:
    """`ImageIndex.update` beside a bar. What is embedded is saved every few minutes, and where something ends it."""
    before = index.features
    try:
        with ProgressBar("embedding") as bar, worker_errors():
            return index.update(batch_size, num_workers, bar.reach, save)
    except BaseException:  # Ctrl-C, a data worker that was killed
        if index.features is not before:
            save()
        raise


def check_query(tokenizer: Tokenizer, text: str) -> None:
    """Raises `ValueError` for a text that is empty, has words that the model does not know, or none that it knows."""
    if not text.strip():
        raise ValueError("the query is empty: describe the image to look for")
    unknown, _ = unknown_words([text], tokenizer)
    if unknown:
        known = ", ".join([*tokenizer.spec][:12])
        raise ValueError(f"the model's vocabulary has no '{unknown[0]}'; its words are {known}, …")
    if not tokenizer.decode(tokenizer.encode(text)):
        raise ValueError(f"'{text}' has no word that the model knows: describe the image to look for")


def cut_note(tokenizer: Tokenizer, text: str) -> str:
    """How much of a query the model reads, as a sentence; empty if it reads all of it."""
    (length,) = tokenizer.lengths([text])
    if length <= tokenizer.context_length:
        return ""
    return f"the query has {length - 2} tokens, of which the model reads the first {tokenizer.context_length - 2}"


def _format(path: Path) -> str:
    """The fingerprint of the model that made an index; raises `DataError` for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") == FORMAT:
            return metadata["model"]
    except Exception as error:  # a forged file makes safetensors and PyTorch raise several types
        raise DataError(f"'{path}' is not a readable image index: {error}") from error
    raise DataError(f"'{path}' is not an image index: choose another file")


def _stamp(path: Path, options: Mapping[str, Any]) -> Stamp:
    state = state_of(path)
    if not state:  # a dangling link, or just removed: reading it reports that
        return (-1, -1)
    return state[0], state[1] + sum(reader_of(path.suffix, options).leading)  # another number is as another file


def _bytes(text: str) -> Tensor:
    """File names as a tensor, because they need not be Unicode, and too many would not fit the file's header."""
    return torch.frombuffer(bytearray(os.fsencode(text)), dtype=torch.uint8) if text else torch.empty(0).byte()


def _text(tensor: Tensor) -> str:
    return os.fsdecode(tensor.numpy().tobytes())

"""From the words of a user to pixels: which images are to be captioned or searched, and decoding them in batches.

Work is divided into units: a batch of files, or a shard. A unit is captioned by one process, in batches that depend on
nothing else, so the captions are the same on any number of processes and after a resume. What cannot be read is
reported and skipped.
"""

import glob
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from braceexpand import braceexpand
from torch.utils.data import DataLoader, Dataset

from coca_lit.data.inputs import IMAGES, ImageReader, other_endings, reader_of
from coca_lit.data.pixels import MAX_IMAGE, SUFFIXES, UNREAD, decode_image
from coca_lit.data.prefetch import worker_options
from coca_lit.data.shards.listing import local_shards
from coca_lit.data.shards.sample import OWN_KINDS, image_of, member_kinds, suffix_of
from coca_lit.data.shards.scan import holds_code
from coca_lit.data.shards.tar import TWICE, group_members, tar_members, tar_writer
from coca_lit.data.transforms import build_transform, loaded
from coca_lit.errors import DataError
from coca_lit.files import state_of
from coca_lit.machine import is_first_process
from coca_lit.models.inputs import Images, Preprocessing, stack_images
from coca_lit.reading import encoding_of, may_pass, open_regular, parse_json, printable, refuse_unlisted

log = logging.getLogger(__name__)

SHARD = ".tar"
ORIGINAL = "original_caption"  # key of KEY.json that keeps what KEY.txt said
ALL = "generated_captions"  # key of KEY.json with all new captions, if several were requested


class Source(NamedTuple):
    """An encoded image, a file or a part of one, or a file of another kind of input."""

    name: str  # for people, and in results
    path: Path
    offset: int = 0
    size: int = -1  # bytes from `offset` on; -1 for all
    reader: ImageReader = IMAGES
    state: tuple[int, ...] = ()  # of the file when it was found, see `state_of`


class OpenShard(NamedTuple):
    """The complete samples of a tar that have an image, in order: where the members KEY.EXTENSION lie."""

    path: Path
    samples: dict[str, dict[str, tuple[int, int]]]  # key -> extension in lower case -> (offset, size)
    problem: str  # what is wrong with the rest of the tar, or ""
    state: tuple[int, ...]  # before it was read

    @property
    def sources(self) -> list[Source]:
        return [
            Source(f"{self.path}/{key}", self.path, offset, size, state=self.state)
            for key, members in self.samples.items()
            for offset, size in [image_of(members)]
        ]


Unit = list[Source] | Path  # a batch of files of one kind, or a shard, see `open_shard`


class ImageBatch(NamedTuple):
    """The decoded images of a list of sources."""

    positions: list[int]  # of the decoded images in the list
    pixels: Images  # (B, 3, S, S) uint8, or an `Input`, one for each position
    broken: dict[int, str]  # position of an image that cannot be read -> reason, a `MayPass` if it may be another time


# Finding


def expected() -> str:
    """What the words of a user may name, the end of a sentence."""
    others = f", other files ({', '.join(other_endings())})" if other_endings() else ""
    return f"expected images ({', '.join(SUFFIXES)}){others}, folders, or shards ({SHARD})"


def picture_endings() -> tuple[str, ...]:
    """Of all files that can be captioned or searched."""
    return (*SUFFIXES, *other_endings())


def find_inputs(words: Sequence[str], batch_size: int, options: Mapping[str, Any] | None = None) -> list[Unit]:
    """Units of the files, folders and shards that `words` name, each file once, in the given order.

    Args:
        words: paths, globs, and ranges like {00000..00099}.tar. A folder means the images in it and its subfolders, or
            its shards if it has no images.
        options: of other kinds of input than images, see `reader_of`.

    Raises:
        DataError: a word matches nothing, or something that cannot be captioned.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    paths = dict.fromkeys(path for word in words for path in _paths(word))
    if not paths:
        raise DataError(f"nothing to caption: {expected()}")
    files = [path for path in paths if path.suffix.lower() != SHARD]
    return [*in_batches(files, batch_size, options), *(path for path in paths if path.suffix.lower() == SHARD)]


def in_batches(paths: Iterable[Path], batch_size: int, options: Mapping[str, Any] | None = None) -> list[list[Source]]:
    """The sources of files: images, then each other kind. A batch has about `batch_size` pictures."""
    kinds: dict[ImageReader, list[Source]] = {IMAGES: []}
    for path in paths:
        reader = reader_of(path.suffix, options)
        kinds.setdefault(reader, []).append(Source(str(path), path, reader=reader, state=state_of(path)))
    batches: list[list[Source]] = []
    for reader, sources in kinds.items():
        size = max(batch_size // math.prod(reader.leading), 1)
        batches += [sources[start : start + size] for start in range(0, len(sources), size)]
    return batches


def find_images(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The images in a folder and its subfolders, sorted by path, without hidden files and folders, and without links to
    files elsewhere.

    Raises:
        DataError: there is no such folder, or one in it cannot be listed.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder '{folder}'")
    inside = folder.resolve()
    found = []
    outside = []
    unread = list[str]()
    for parent, folders, names in os.walk(folder, onerror=refuse_unlisted):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if name.startswith(".") or not name.lower().endswith(suffixes):
                continue
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                outside.append(path)
            else:
                found.append(path)
        unread += [name for name in names if name.lower().endswith(UNREAD) and not name.startswith(".")]
    if found and unread and is_first_process():
        kinds = ", ".join(sorted({Path(name).suffix.lower() for name in unread}))
        log.warning("left out %d photos in %s: %s is not read, convert them to .jpg", len(unread), folder, kinds)
    if outside and is_first_process():
        example = printable(str(min(outside)))
        log.warning("left out %d links out of %s, e.g. %s: copy the files there", len(outside), folder, example)
    return sorted(found)


def _paths(word: str) -> Iterator[Path]:
    path = Path(word)
    if os.path.isdir(path):  # unlike Path's, it also takes names that no file can have
        found = find_images(path, picture_endings()) or find_images(path, (SHARD,))
        if not found:
            raise DataError(f"no image and no shard in '{word}'")
        yield from found
    elif os.path.isfile(path):
        if path.suffix.lower() not in (*picture_endings(), SHARD):
            raise DataError(f"'{word}' has the unknown suffix '{path.suffix}': {expected()}")
        yield path
    elif os.path.lexists(path):
        raise DataError(f"'{word}' is neither a file nor a folder nor a link to one: {expected()}")
    elif word.endswith(SHARD):
        yield from local_shards(word)
    else:
        try:
            matches = [
                name
                for part in braceexpand(word, escape=os.sep == "/")
                for name in sorted(glob.glob(part, recursive=True))
            ]
        except ValueError:  # an unmatched brace
            matches = []
        if not matches:
            raise DataError(f"there is no '{word}': {expected()}")
        for match in matches:
            yield from _paths(match)


# Decoding


def load_images(
    batches: Iterable[Sequence[Source]], preprocessing: Preprocessing, num_workers: int = 0
) -> Iterator[ImageBatch]:
    """Each batch of sources, in order, transformed as for evaluation.

    Args:
        batches: consumed in the calling process, a few batches ahead of the result.
        preprocessing: that of the model.
        num_workers: processes that decode ahead; 0 decodes on demand.
    """
    yield from DataLoader(
        _Decoded(preprocessing),
        batch_sampler=batches,  # type: ignore[arg-type]  # its "indices" are sources
        collate_fn=_collate,
        **worker_options(num_workers),
    )


class MayPass(str):
    """A reason that is of the disk and not of the image."""


class _Decoded(Dataset[Images | str]):
    """source -> pixels (3, S, S), or a single `Input`, or the reason why it cannot be read."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.transform = build_transform(**preprocessing)

    def __getitem__(self, source: Source) -> Images | str:
        try:
            if source.size < 0:
                return loaded(source.reader.file(source.path), self.transform)
            with open_regular(source.path) as file:
                file.seek(source.offset)
                content = file.read(min(source.size, MAX_IMAGE + 1))
            return self.transform(decode_image(content, source.name))
        except DataError as error:
            return str(error)
        except OSError as error:
            return MayPass(f"{source.name} cannot be read: {error}")


def _collate(items: list[Images | str]) -> ImageBatch:
    good = {i: item for i, item in enumerate(items) if not isinstance(item, str)}
    broken = {i: item for i, item in enumerate(items) if isinstance(item, str)}
    pixels = stack_images([*good.values()]) if good else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return ImageBatch([*good], pixels, broken)


# Shards to be recaptioned. Nothing is unpacked: images are read at their offsets, so that many processes decode one
# shard and none holds it in memory. All members of a sample are copied byte for byte, except .txt and .json, and those
# that could hold code, which are left out. The same captions make the same file.


def open_shard(path: Path) -> OpenShard:
    """Reads the positions of its samples."""
    state = state_of(path)
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    begun: set[str] = set()
    problem = ""
    outside: list[str] = []
    harmless = (member for member in tar_members(path, outside=outside) if not holds_code(member.name))
    try:
        for fields in group_members(harmless, content=False):
            if TWICE in fields:
                problem = f"two members have the name {fields[TWICE]!r}"
                continue
            key = fields["__key__"]
            has_image = bool(suffix_of(fields))
            if not has_image:
                _refuse_others(path, fields)
            if has_image and key in samples:  # captions are kept by key
                problem = f"two samples have the key {key!r}"
            elif key in begun:
                problem = f"the members of {key!r} do not follow each other"
            if has_image:
                members = {name: place for name, place in fields.items() if name and not name.startswith("_")}
                samples.setdefault(key, members)
            begun.add(key)
    except DataError:
        raise
    except Exception as error:  # Python's reader raises many types on damaged files
        if may_pass(error):
            raise DataError(f"{path} could not be read ({error}): start again, or leave it out") from error
        problem = str(error) or type(error).__name__  # the sample in which it occurs is not among the samples
    if outside and not problem:
        problem = f"the member {outside[0]!r} leads out of the shard"
    return OpenShard(path, samples, problem, state)


def _refuse_others(path: Path, fields: Mapping[str, Any]) -> None:
    """Raises `DataError` for a sample of another kind of input than images."""
    for suffixes in member_kinds()[len(OWN_KINDS) :]:
        suffix = suffix_of(fields, suffixes)
        if suffix:
            kind = reader_of(f".{suffix}").kind
            raise DataError(f"{path} holds {kind}s: only {kind}s in files of their own are captioned")


def write_shard(source: OpenShard, target: Path, captions: Mapping[str, Sequence[str]]) -> None:
    """Writes `target`, a copy of `source` with new captions; samples without one are left out.

    Args:
        captions: key of a sample -> its captions, the best first.

    Raises:
        DataError: nothing can be written there, or the source has changed since it was opened.
    """
    with tar_writer(target) as tar, open_regular(source.path) as file:
        if state_of(file.fileno()) != source.state:
            raise DataError(f"{source.path} has changed while it was captioned: start again")
        for key, places in source.samples.items():
            if key not in captions:
                continue
            members = {}
            for extension, (offset, size) in places.items():
                file.seek(offset)
                members[extension] = file.read(size)
            tar.write({"__key__": key, **_recaptioned(members, captions[key])})


def _recaptioned(members: dict[str, bytes], captions: Sequence[str]) -> dict[str, bytes]:
    """The members with the new caption as .txt and the old one in .json, unless that has an older one already."""
    content = members.get("json", b"{}")
    try:
        fields = parse_json(content, "the JSON", dict)
    except DataError:
        fields = {"broken_json": content.decode("utf-8", errors="replace")}
    if "txt" in members:
        text = members["txt"]
        fields.setdefault(ORIGINAL, text.decode(encoding_of(text), errors="replace").strip())
    fields.pop(ALL, None)  # of the model before
    if len(captions) > 1:
        fields[ALL] = list(captions)
    return members | {"txt": captions[0].encode(), "json": json.dumps(fields).encode()}

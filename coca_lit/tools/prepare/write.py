"""Writes any source of captioned images as shards with a manifest: `coca-data prepare`.

Equal sources give equal bytes: order, keys and time stamps depend on the content alone. Each shard appears under its
name when it is complete, and an interrupted command resumes where it stopped.
"""

import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.datasets.annotations import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    captions_in,
    clean,
    column,
    file_name,
    open_table,
)
from coca_lit.data.datasets.captions import FlickrName, flickr_records, mscoco_records
from coca_lit.data.datasets.folder import captions_beside, captions_file, folder_records, no_split, split_of
from coca_lit.data.pixels import MAX_IMAGE, SUFFIXES, decode_image
from coca_lit.data.records import ImageFile, Record
from coca_lit.data.shards.sample import MAX_TEXT, image_of
from coca_lit.data.shards.scan import read_fields
from coca_lit.data.shards.shard import ManifestEntry, Shard, entry_of, sha256_of
from coca_lit.data.shards.tar import tar_writer
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.files import OLD, append_lines, atomic_write, is_leftover, remove_leftovers, size_and_time, whole_lines
from coca_lit.reading import counts_of, encoding_of, may_pass, open_regular, parse_json, printable, texts_of
from coca_lit.tools.prepare import Run

JOURNAL = ".prepare.journal"  # digest of the plan, then a line per shard; kept, so that a repetition finds all done
MISSING, UNREAD = "missing image", "file could not be read"  # reasons that may pass: of a disk that is not there
DIGITS = 5  # of a shard's number, as img2dataset writes them
_OWN = ("caption", "captions", "height", "key", "source_key", "width")  # of the JSON: written here, whatever the source
_KNOWN = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))


class Pair(NamedTuple):
    """An image file and its captions, of which there may be none: to be written as shards."""

    image: Path
    captions: tuple[str, ...]


class Task(NamedTuple):
    """The content of one shard: some pairs, or the samples of a shard of img2dataset."""

    number: int
    content: tuple[Pair, ...] | Path

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return f"{self.number:0{DIGITS}d}.tar"


class Written(NamedTuple):
    """The result of a task; a shard without samples is not kept."""

    name: str
    entry: ManifestEntry
    bad: dict[str, int]  # skipped samples by reason
    examples: list[str]
    sources: str  # a digest of the state of the files before they were read


Found = tuple[int, str, bytes, tuple[str, ...], dict[str, Any]]  # place, name, image, captions, further data


def plan_pairs(pairs: Sequence[Pair], per_shard: int | None) -> list[Task]:
    """Shards of `per_shard` pairs; by default 10,000, or fewer so that there are 16 shards for 16 readers."""
    size = per_shard or max(1, min(10_000, -(-len(pairs) // 16)))
    return [Task(n, tuple(pairs[i : i + size])) for n, i in enumerate(range(0, len(pairs), size))]


def prepare(tasks: Sequence[Task], output: Path, run: Run) -> Iterator[Written]:
    """Writes all shards that do not exist yet, and those whose sources have changed or can be read by now; yields them
    as they are ready, existing ones first.

    Args:
        run: calls `write_shard` for all tasks, anywhere.

    Raises:
        DataError: the folder holds something else.
    """
    digest = hashlib.sha256()  # of everything that the shards depend on, except the content of the images
    for task in tasks:
        digest.update(repr(tuple(task)).encode())
    known = _open_journal(output, digest.hexdigest())
    done = {task.name for task in tasks if task.name in known and not _may_differ(task, known[task.name])}
    remove_leftovers(output, older=OLD)
    yield from (known[task.name] for task in tasks if task.name in done)
    todo = [task for task in tasks if task.name not in done]
    for written in run(write_shard, todo, output):
        append_lines(output / JOURNAL, [json.dumps(written)])
        yield written


def _may_differ(task: Task, written: Written) -> bool:
    """Whether another attempt may find something else: a file could not be read, or its size or time is another. Where
    more files are out of reach than then, the shard is kept: it has what they held.
    """
    sources, gone = _state(task)
    had_gone = written.bad.get(MISSING, 0) + written.bad.get(UNREAD, 0)
    return gone <= had_gone and (UNREAD in written.bad or written.sources != sources)


def _state(task: Task) -> tuple[str, int]:
    """A digest of sizes and times of change of the files of a task, and how many of them are out of reach now."""
    digest = hashlib.sha256()
    gone = 0
    for path in [task.content] if isinstance(task.content, Path) else [pair.image for pair in task.content]:
        state = None
        try:
            state = size_and_time(path)
        except (OSError, ValueError) as error:  # ValueError: it is no path
            gone += may_pass(error)
        digest.update(repr(state).encode())
    return digest.hexdigest()[:16], gone


def write_shard(task: Task, output: Path) -> Written:
    """Keys as img2dataset writes them: the number of the shard, then the place of the sample among those that belong
    into it, with leading zeros. So a photo that is repaired later gives no other sample its key.
    """
    bad, (sources, _) = BadSamples(1.0), _state(task)
    path = output / task.name
    count = 0
    with tar_writer(path) as tar:
        for sample in _samples(task, bad):
            count += 1
            tar.write(sample)
    entry = ManifestEntry(count, path.stat().st_size, sha256_of(path))
    if not count:
        path.unlink()
    return Written(task.name, entry, dict(bad.reasons), bad.examples(), sources)


def _samples(task: Task, bad: BadSamples) -> Iterator[dict[str, Any]]:
    """The members of the usable samples; each image is decoded once."""
    content = task.content
    source = _from_shard(content, bad) if isinstance(content, Path) else _from_pairs(content, bad)
    for place, name, image, captions, meta in source:
        bad.seen += 1
        if not captions:
            bad.add("missing caption", "", name)
            continue
        try:
            picture = decode_image(image, "it")
        except DataError as error:
            bad.add("unreadable image" if image else "no image", "", name, str(error) if image else "")
            continue
        size = {"width": picture.width, "height": picture.height}
        if not image.startswith(tuple(start for start, _ in _KNOWN)):  # GIF and BMP
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=95)
            image = buffer.getvalue()
        yield _members(f"{task.number:0{DIGITS}d}{place:05d}", image, captions, {**meta, **size})


def _from_pairs(pairs: Iterable[Pair], bad: BadSamples) -> Iterator[Found]:
    for place, pair in enumerate(pairs):
        try:
            with open_regular(pair.image) as file:
                content = file.read(MAX_IMAGE + 1)
        except (OSError, ValueError) as error:  # not only of missing files: a caption in a wrong column is no path
            bad.seen += 1
            if isinstance(error, FileNotFoundError):
                bad.add(MISSING, "", str(pair.image))
            else:
                reason = UNREAD if may_pass(error) else "unreadable image"
                bad.add(reason, "", str(pair.image), getattr(error, "strerror", "") or str(error))
            continue
        yield place, str(pair.image), content, pair.captions, {"source": printable(pair.image.name)}


def _from_shard(path: Path, bad: BadSamples) -> Iterator[Found]:
    counted = BadSamples(1.0)
    for place, fields in enumerate(read_fields(Shard(str(path)), counted, verify=True)):  # ends where a read fails
        try:
            meta = parse_json(fields.get("json", b"{}")[: MAX_TEXT + 1], "the JSON", dict)
        except DataError:
            meta = {}
        text = fields.get("txt", b"")[:MAX_TEXT]
        caption = text.decode(encoding_of(text), errors="replace")
        more = meta.get("captions")
        captions = tuple(dict.fromkeys(clean([caption, *(more if isinstance(more, list) else ())])))
        meta = {**meta, "source_key": fields["__key__"]}
        yield place, fields["__key__"], image_of(fields), captions, meta
    details = {found.reason: found.detail for found in reversed(counted.found)}  # the first of each reason
    for reason, count in counted.reasons.items():
        bad.seen += count
        bad.add(reason, "", str(path), details[reason], count)


def _members(key: str, image: bytes, captions: tuple[str, ...], meta: dict[str, Any]) -> dict[str, Any]:
    suffix = next(suffix for start, suffix in _KNOWN if image.startswith(start))
    meta = {**meta, "key": key, "caption": captions[0], "captions": captions}
    text = _json(meta)
    if len(text) > MAX_TEXT:  # more than is read of it: without what the source said
        text = _json({name: value for name, value in meta.items() if name in _OWN})
    return {"__key__": key, suffix: image, "txt": captions[0].encode(), "json": text}


def _json(content: dict[str, Any]) -> bytes:
    """On one line: an indent would multiply nested lists by their depth."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False).encode()


def _open_journal(output: Path, digest: str) -> dict[str, Written]:
    """The shards that exist already."""
    journal = output / JOURNAL
    if not journal.exists():
        if output.is_dir() and not all(map(is_leftover, output.iterdir())):
            raise DataError(f"{output} is not empty: give a new folder, or remove what is there first")
        atomic_write(journal, f"{digest}\n".encode())
        return {}
    first, *lines = [*whole_lines(journal)] or [""]
    if first.strip() != digest:
        raise DataError(f"{output} was begun from another source or with other options: give a new one, or remove it")
    done = {}
    for line in lines:
        try:
            name, entry, bad, examples, sources = parse_json(line, str(journal), list)
            if not isinstance(name, str) or not re.fullmatch(r"\d+\.tar", name, re.ASCII):
                raise ValueError(f"{name!r} is not the name of a shard")
            written = Written(name, entry_of(entry), counts_of(bad), texts_of(examples), str(sources))
        except (DataError, ValueError, TypeError):
            continue  # damaged by a crash of the machine
        path = output / name
        if not written.entry.samples or (path.is_file() and path.stat().st_size == written.entry.bytes):
            done[name] = written
    return done


# Sources: tables, folders with a table, COCO and Flickr folders, and folders of image and text files


def read_pairs(
    source: Path, image_column: str | None = None, caption_column: str | None = None, split: str = "train"
) -> list[Pair]:
    """All pairs of a source, in an order that depends on its content alone.

    Args:
        source: a .csv, .tsv or .parquet file with a column of paths (relative to the file) and one of captions; or a
            folder of photos with captions.csv, .tsv, .jsonl or .json as `folder_records` reads it; or one in the layout
            of COCO, Flickr8k or Flickr30k; or a folder, however deep, of NAME.jpg and NAME.txt, a caption per line.
        image_column, caption_column: of a table that is the source; by default the first of the usual names it has.
        split: of COCO and Flickr, and of a table, or a folder, whose captions name splits.

    Raises:
        DataError: the source is none of these, or holds no pair; or columns are named of a table within a folder.
    """
    if source.is_file():
        pairs = _read_table(source, image_column, caption_column, split)
    elif not source.is_dir():
        raise DataNotFoundError(f"there is no file or folder {source}")
    elif image_column or caption_column:  # whoever names a column must not get the captions of another one
        raise DataError(
            f"{captions_file(source) or source} is read by its usual columns: call them file and caption, or give the "
            "table as source"
        )
    elif records := _known_records(source):
        found = [(record.image, clean(record.captions)) for record in records(split)]
        pairs = [Pair(image.path, captions) for image, captions in found if isinstance(image, ImageFile)]  # all are
    else:
        pairs = [Pair(source / name, captions) for name, captions, _ in captions_beside(source, SUFFIXES)]
    if not pairs:
        raise DataError(
            f"{source} holds no captioned images: expected a .csv, .tsv or .parquet file, a folder with captions.csv, "
            "a COCO or Flickr folder, a folder of NAME.jpg and NAME.txt, or one of img2dataset's .tar files"
        )
    return pairs


def _known_records(root: Path) -> Callable[[str], list[Record]] | None:
    if captions_file(root):  # first, as in a training on the same folder
        return functools.partial(folder_records, root, hold_out=False)
    for name in get_args(FlickrName):
        if (root / f"dataset_{name}.json").is_file():
            return functools.partial(flickr_records, root, name=name)
    coco = (root / "dataset_coco.json", root / "annotations" / "dataset_coco.json")
    if any(path.is_file() for path in coco) or [*root.glob("annotations/captions_*.json")]:
        return functools.partial(mscoco_records, root)
    return None


def _read_table(path: Path, image_column: str | None, caption_column: str | None, split: str) -> list[Pair]:
    """Rows with the same image are one pair with several captions, as is a row with a list of them."""
    columns, rows = open_table(path)
    image = column(path, columns, IMAGE_COLUMNS, "name it with --image-column", image_column)
    caption = column(path, columns, CAPTION_COLUMNS, "name it with --caption-column", caption_column)
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for row in rows:
        texts = row[caption]
        name = row[image]
        if not isinstance(name, str | None):  # such as the {bytes, path} of data sets on the Hub
            raise DataError(
                f"{path} holds no paths in its column {image!r}, but values of type {type(name).__name__}: "
                "save the images as files, and name a column of their paths with --image-column"
            )
        if not name or not name.strip():
            continue
        name = file_name(name)
        captions.setdefault(name, []).extend(captions_in(texts, path))
        if splits.setdefault(name, its := split_of(row, path) or "train") != its:
            raise DataError(f"{path} puts {printable(name)} into {splits[name]} and {its}: a photo has one split")
    if captions and split not in splits.values():
        raise no_split(path, split, [*splits.values()], of_run=False)
    return [Pair(path.parent / name, clean(texts)) for name, texts in captions.items() if splits[name] == split]

"""Your own photos with their captions, in one folder:

- `captions.csv`, `.tsv`, `.jsonl` or `.json` with rows of file and caption, several rows per file if it has several
  captions, and if you like a column `split` of train, val and test;
- `captions.json` in the schema of COCO, or COCO's own folder with its annotations/;
- else `photo.jpg` beside `photo.txt`, however deep, with a caption per line;
- else the only .csv, .tsv or .jsonl there is, with the same rows.

Files are named relative to the folder, or to images/ in it. The folder may be a stranger's: files are read within
bounds, and nothing outside of it.
"""

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from coca_lit.data.datasets.annotations import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    MAX_BYTES,
    captions_in,
    clean,
    coco_listings,
    column,
    file_name,
    named,
    read_rows,
    schema,
)
from coca_lit.data.datasets.captions import mscoco_records
from coca_lit.data.inputs import source_of
from coca_lit.data.near_duplicates import hash_files, held_out
from coca_lit.data.pixels import SUFFIXES, UNREAD
from coca_lit.data.records import MAX_MISSING, ImageFile, Listing, Record, most_bad, not_found
from coca_lit.errors import DataError
from coca_lit.reading import (
    check_inside,
    encoding_of,
    may_pass,
    not_utf8,
    printable,
    read_bounded,
    read_json,
    refuse_unlisted,
)

log = logging.getLogger(__name__)

CAPTIONS = ("captions.csv", "captions.tsv", "captions.jsonl", "captions.json")
TABLES = (".csv", ".tsv", ".jsonl")
HOW = f"put photos into it, with {', '.join(CAPTIONS[:3])} or {CAPTIONS[3]} of file and caption, or a .txt beside each"
COLUMNS = "call the columns file and caption"
MAX_TEXT = 2**20  # bytes of a .txt
HELD_OUT = 0.1  # share of the photos that are not trained on, if no split is given
SPLITS = {
    **dict.fromkeys(("train", "training", "restval", ""), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    "test": "test",
}

Listed = tuple[Listing, str | None]  # with the split, if it names one


def folder_records(
    root: str | Path, split: str, suffixes: tuple[str, ...] = SUFFIXES, hold_out: bool = True
) -> list[Record]:
    """Records of "train" or "val", or of any split that the captions name; the id of each is the name of its file.

    Where no split is named, a tenth of the photos is held out by what they show, and photos that look alike stay
    together (`coca_lit.data.near_duplicates`).

    Args:
        suffixes: of the files beside which a .txt may be.
        hold_out: hold a tenth out where no split is named; if not, all photos are "train".

    Raises:
        DataError: the folder holds no captioned photos, a name leads out of it, more than `MAX_MISSING` of the files
            are missing, too many of those to score are broken, or there is no such split.
    """
    root = Path(root)
    if not root.is_dir():
        raise not_found("the folder of photos", [root], HOW)
    if not captions_file(root) and [*root.glob("annotations/captions_*.json")]:
        for path in (root / "dataset_coco.json", *root.glob("annotations/*.json")):
            check_inside(path, root)
        records = mscoco_records(root, split)
        files = {str(r.image.path): r.image.path for r in records if isinstance(r.image, ImageFile)}  # all are
        for path in files.values():
            check_inside(path, root)
        readable = _decodable(files, files, split) if hold_out and split != "train" else files
        return [r for r in records if isinstance(r.image, ImageFile) and str(r.image.path) in readable]
    photos, files = _photos(root, suffixes)
    if not photos:
        raise not_found("captioned photos", [root], HOW)
    return records_of(root, photos, files, split, hold_out)


def records_of(
    place: Path, rows: Sequence[Listed], files: Mapping[str, Path], split: str, hold_out: bool = True
) -> list[Record]:
    """Records of a split; where no row names one, a tenth of the photos is held out by what they show.

    Args:
        place: of the rows, for errors.
        rows: all of whose files are there.
        hold_out: as of `folder_records`.
    """
    splits = [named_split for _, named_split in rows]
    if rows and hold_out and not any(splits):
        if rows[0][0].further:
            raise DataError(f"{place} has two images a row and no splits: add a column split of train and val")
        names = list(dict.fromkeys(row.filename for row, _ in rows))
        chosen = {names[i] for i in held_out(hash_files([files[name] for name in names]), HELD_OUT)}
        splits = ["val" if row.filename in chosen else "train" for row, _ in rows]
    used = [row for (row, _), of_row in zip(rows, splits, strict=True) if (of_row or "train") == split]
    if used and hold_out and split != "train":
        readable = _decodable([name for row in used for name in row.files], files, split)
        used = [row for row in used if readable >= {*row.files}]
    if not used:
        raise no_split(place, split, splits, of_run=hold_out)
    return [row.record(files) for row in used]


def _decodable(names: Iterable[str], files: Mapping[str, Path], split: str) -> set[str]:
    """The photos of a split to score that can be decoded. Another one would end the run at its first validation.

    Raises:
        DataError: more than `most_bad` of them cannot be decoded.
    """
    different = list(dict.fromkeys(names))
    hashes = hash_files([files[name] for name in different])
    broken = []
    for name in (name for name, found in zip(different, hashes, strict=True) if found is None):
        try:
            source_of(files[name])()
        except DataError as error:
            if may_pass(error.__cause__) or isinstance(error.__cause__, ImportError):  # it is not the photo
                raise
            broken.append(name)
    if broken:
        what = f"{len(broken)} of {len(different)} photos of {split!r} cannot be decoded, e.g. {printable(broken[0])}"
        if len(broken) > most_bad(len(different)):
            raise DataError(f"{what}: fix or remove them")
        _warn(f"left out: {what}")
    return {*different} - {*broken}


def no_split(place: Path, split: str, splits: Sequence[str | None], of_run: bool = True) -> DataError:
    """The error for a split that is not among those of the photos.

    Args:
        of_run: say which keys of a run help.
    """
    known = sorted({given or "train" for given in splits})
    other = next((name for name in reversed(known) if name != "train"), None)
    keys = f"scoring.split={other} data.val_split={other}" if other else "data.val_split=null 'evals=[]'"
    way_on = f": set {keys}" if of_run and split != "train" else ""
    return DataError(f"{place} has no split {split!r}, but {', '.join(known) or 'none'}{way_on}")


def folder_training_captions(root: str | Path) -> list[str]:
    """All captions of the training split."""
    return [caption for record in folder_records(root, "train") for caption in record.captions]


def captions_file(root: Path) -> Path | None:
    """The table or JSON of captions in the folder; raises `DataError` for several, and for a link out of it."""
    found = [root / name for name in CAPTIONS if (root / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{root} has both {found[0].name} and {found[1].name}: leave one of them")
    for path in found:
        check_inside(path, root)
    return found[0] if found else None


def _photos(root: Path, suffixes: tuple[str, ...]) -> tuple[list[Listed], dict[str, Path]]:
    """Every photo that is there and has a caption, in an order that depends on the content alone; and the files."""
    path = captions_file(root)
    rows = list(_rows(path) if path is not None else captions_beside(root, suffixes))
    if path is None and not any(captions for _, captions, _ in rows):
        path = _only_table(root)
        if path is not None:
            rows = list(_rows(path))
    files = files_inside([name for name, captions, _ in rows if captions], root)
    unread = [name for name in files if name.lower().endswith(UNREAD)]
    if unread:
        kinds = ", ".join(sorted({Path(name).suffix.lower() for name in unread}))
        message = f"{len(unread)} of {len(files)} photos in {root}, e.g. {printable(unread[0])}"
        if len(unread) == len(files):
            raise DataError(f"{message}: {kinds} is not read, convert them to .jpg")
        _warn(f"left out {message}: {kinds} is not read, convert them to .jpg")
        files = {name: file for name, file in files.items() if name not in unread}
    first = {file: name for name, file in reversed(files.items())}  # a file may have several names
    listed: dict[str, tuple[list[str], set[str]]] = {}
    for name, captions, split in rows:
        texts, splits = listed.setdefault(first[files[name]] if name in files else name, ([], set()))
        texts += captions
        splits.update([split] if split is not None else [])
    photos = []
    for name, (texts, splits) in sorted(listed.items()):
        if len(splits) > 1:
            raise DataError(f"{path} puts {printable(name)} into {' and '.join(sorted(splits))}: a photo has one split")
        if texts:
            photos.append((Listing(name, name, tuple(texts)), next(iter(splits), None)))
    if len(photos) < len(listed):
        _warn(f"left out {len(listed) - len(photos)} of {len(listed)} photos without a caption in {root}")
    return [(photo, split) for photo, split in photos if photo.filename in files], files


def _only_table(root: Path) -> Path | None:
    """A table under any name, where no other place has captions; raises `DataError` for several, and for a link."""
    tables = sorted(path for path in root.glob("[!.]*") if path.suffix in TABLES and path.is_file())
    if len(tables) > 1:
        names = " and ".join(printable(path.name) for path in tables[:2])
        raise DataError(f"{root} has the tables {names}: call the one with the captions captions{tables[0].suffix}")
    for path in tables:
        check_inside(path, root)
        _warn(f"captions are read from {printable(path.name)}, the only table in {root}")
    return tables[0] if tables else None


@cache  # each split reads the folder
def _warn(message: str) -> None:
    log.warning("%s", message)


def _rows(path: Path) -> Iterator[tuple[str, Iterable[str], str | None]]:
    """(file, captions, split) of every row."""
    if path.suffix == ".json":
        rows = read_json(path, limit=MAX_BYTES)
        if isinstance(rows, dict):
            yield from ((item.filename, clean(item.captions), None) for item in coco_listings(rows, path))
            return
    else:
        rows = read_rows(path)
    image = caption = ""
    with schema(path, "the captions'"):
        for row in rows:
            if not image:
                names = [name for name in row if not isinstance(row[name], list) or name != "file"]
                image = column(path, names, IMAGE_COLUMNS, COLUMNS)
                caption = column(path, names, CAPTION_COLUMNS, COLUMNS)
            name = row[image]
            several = row.get("captions")
            texts = several if several and isinstance(several, list) else row[caption]
            # `coca-caption` writes them beside the best one: in its rows one of the two was corrected.
            one = row.get("caption")
            if (
                isinstance(row.get("file"), list)
                and isinstance(one, str)
                and one
                and one not in captions_in(texts, path)
            ):
                what = f"{path}: {printable(one[:80])!r} is none of the captions of {printable(str(name))}"
                raise DataError(f"{what}: correct both fields, or take one of them out")
            if not isinstance(name, str):
                raise TypeError(f"expected the name of a file, got {name!r:.80}")
            if name.strip():
                yield file_name(name), clean(captions_in(texts, path)), split_of(row, path)


def split_of(row: Mapping[str, Any], path: Path) -> str | None:
    """The split that a row names, by our names; None if it names none. Raises `DataError` for another name."""
    split = row.get(named(row, ["split"]) or "split")
    if split is None:
        other = named(row, ["set", "partition"])
        if other is not None and str(row[other]).strip().lower() in SPLITS.keys() - {""}:
            raise DataError(f"{path} has the column {other!r} with {row[other]!r}: call it split, or something else")
        return None
    if not isinstance(split, str) or split.strip().lower() not in SPLITS:
        raise DataError(f"{path} has the split {printable(str(split)[:80])!r}: expected train, val or test")
    return SPLITS[split.strip().lower()]


def captions_beside(root: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...], None]]:
    """(file, captions, no split) of every photo that is not hidden, with the lines of the .txt of the same name."""
    unread: list[str] = []
    shared: list[str] = []
    for folder, folders, files in os.walk(root, onerror=refuse_unlisted):  # follows no links to folders
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            check_inside(Path(folder, name), root)
        photos = [name for name in sorted(files) if Path(name).suffix.lower() in suffixes]
        shown = Counter(map(_stem, photos))
        texts = {_stem(name): name for name in sorted(files) if name.lower().endswith(".txt")}
        described = texts.keys() - shown
        unread += [n for n in sorted(files) if not n.lower().endswith(".txt") and _stem(n) in described]
        shared += [texts[stem] for stem in texts if shown[stem] > 1]
        for path in (Path(folder, name) for name in sorted(files) if not name.startswith(".")):
            if path.suffix.lower() in suffixes:
                text = path.with_name(texts.get(_stem(path.name), f"{path.stem}.txt"))
                content = b""
                if text.is_file():
                    for file in (path, text):
                        if file.is_symlink():  # what else is found in the folder lies there
                            check_inside(file, root)
                    content = read_bounded(text, MAX_TEXT, "is not readable")
                try:
                    lines = content.decode(encoding_of(content)).splitlines()
                except UnicodeDecodeError as error:
                    raise DataError(not_utf8(text, error)) from error
                yield path.relative_to(root).as_posix(), clean(lines), None
    if unread:
        known = ", ".join(suffixes)
        _warn(f"left out {len(unread)} files with a .txt in {root}, e.g. {printable(unread[0])}: only {known} are read")
    if shared:
        _warn(f"{len(shared)} .txt in {root} are the captions of several photos each, e.g. {printable(shared[0])}")


def _stem(name: str) -> str:
    """The name of a file without its ending. Archives of macOS decompose accents, of some of the files at times."""
    return unicodedata.normalize("NFC", Path(name).stem)


def files_inside(names: Iterable[str], root: Path) -> dict[str, Path]:
    """The file of each name that has one, in the folder or its images/. Archives of macOS decompose the accents of file
    names.

    Raises:
        DataError: a name or a link leads out of the folder, or more than `MAX_MISSING` of the files are missing.
    """
    given = list(dict.fromkeys(names))
    files = dict[str, Path]()
    ways = [given]
    plain = [PurePosixPath(text).as_posix() for text in given]
    for folder in _names_of(root):  # `coca-caption FOLDER` writes it before the names
        below = [text.startswith(f"{folder}/") for text in plain]
        if any(below):
            listed = zip(given, below, strict=True)
            ways.append([str(PurePosixPath(text).relative_to(folder)) if is_in else text for text, is_in in listed])
    found = [(way, [_file(name, root) for name in way]) for way in ways]
    found.sort(key=lambda of: of[1].count(None))  # as they are written first, if that is as good
    for i, text in enumerate(given):
        path = next((paths[i] for _, paths in found if paths[i] is not None), None)
        if path is not None:
            check_inside(path, root)
            files[text] = path
        elif all(_leads_out(way[i]) for way, _ in found):
            raise DataError(f"{root} names {printable(text)!r}, which is not relative to the folder")
    missing = [text for text in given if text not in files]
    if len(missing) > MAX_MISSING * (len(files) + len(missing)):
        what = f"{len(missing)} of {len(files) + len(missing)} photos, e.g. {printable(missing[0])},"
        raise not_found(what, [root, root / "images"], "name files relative to the folder")
    if missing:
        log.warning("skipped %d photos without a file, e.g. %s", len(missing), printable(missing[0]))
    return files


def _names_of(root: Path) -> list[PurePosixPath]:
    """By which a folder may have been given from some other folder."""
    places = [root.absolute(), root.resolve()]
    tails = [Path(*place.parts[i:]) for place in places for i in range(len(place.parts))]
    names = dict.fromkeys(PurePosixPath(path.as_posix()) for path in (root, *tails))
    return [name for name in names if name.parts]


def _leads_out(name: str) -> bool:
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name


def _file(text: str, root: Path) -> Path | None:
    if _leads_out(text):
        return None
    forms = dict.fromkeys((text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))))
    return next(filter(os.path.isfile, (place / form for form in forms for place in (root, root / "images"))), None)

"""Texts about one or two images, each with a label: SNLI-VE and NLVR2 in their original files, and your own in a table.

The text is the `question` of a record, the label its only caption, and a second image is in `further`.
"""

import logging
from collections import Counter
from collections.abc import Hashable
from pathlib import Path

from coca_lit.data.datasets.annotations import (
    IMAGE_COLUMNS,
    column,
    find_file,
    listing,
    named,
    named_split,
    read_json_lines,
    read_rows,
    schema,
)
from coca_lit.data.datasets.folder import Listed, files_inside, records_of, split_of
from coca_lit.data.records import Listing, Record, records_on_disk
from coca_lit.errors import DataError

log = logging.getLogger(__name__)

ENTAILMENT = ("contradiction", "entailment", "neutral")  # labels of SNLI-VE
TRUTHS = ("False", "True")  # labels of NLVR2
PAIRS = ("pairs.csv", "pairs.tsv", "pairs.jsonl")
SECOND_COLUMNS = ("image2", "image_2", "second_image", "right")
TEXT_COLUMNS = ("text", "statement", "hypothesis", "sentence", "question", "caption")
LABEL_COLUMNS = ("label", "gold_label", "class", "answer")
MAX_LABELS = 10_000

_SNLI_VE = (
    "put snli_ve_train.jsonl, _dev and _test of the repository SNLI-VE into it, or into its data/, and the photos of "
    "Flickr30k into its flickr30k_images/, or name their folder by records.images"
)
_NLVR2 = "put data/ of NLVR2's repository into it, and its images into images/train/, dev/ and test1/"
_HOW = f"put {PAIRS[0]}, .tsv or .jsonl with the columns image, text and label (and image2) into it"


def snli_ve_records(root: str | Path, split: str, images: str | Path | None = None) -> list[Record]:
    """SNLI-VE (Xie et al. 2019, arXiv 1901.06706): a hypothesis about a photo of Flickr30k, and one of `ENTAILMENT`.

    Args:
        root: folder of snli_ve_train.jsonl, …, or with these in data/.
        split: "train", "val" (dev) or "test".
        images: folder of Flickr30k's photos; by default in `root`.
    """
    root, name = Path(root), named_split(split, {"train": "train", "val": "dev", "test": "test"}, "SNLI-VE")
    file = f"snli_ve_{name}.jsonl"
    path = find_file("SNLI-VE", [root / file, root / "data" / file], _SNLI_VE)
    listings: list[Listing] = []
    left_out = 0
    with schema(path, "SNLI-VE's"):
        for row in read_json_lines(path):
            label, photo = row["gold_label"], row["Flickr30K_ID"]
            if label not in ENTAILMENT:  # "-": the people asked did not agree
                left_out += 1
                continue
            listings.append(listing(row["pairID"], f"{photo}.jpg", (label,), question=row["sentence2"]))
    if left_out:
        log.warning("left out %d texts without a label in %s", left_out, path)
    _expect_texts(listings, path)
    named = [Path(images)] if images is not None else []
    folders = [*named, *(root / folder for folder in ("flickr30k_images", "flickr30k-images", "images"))]
    return records_on_disk(listings, folders, path, _SNLI_VE)


def nlvr2_records(root: str | Path, split: str) -> list[Record]:
    """NLVR2 (Suhr et al. 2019, arXiv 1811.00491): a statement about two photos, "True" or "False".

    Args:
        root: folder of the repository's data/ or of its files, and of the images: images/train/NUMBER/, dev/ and
            test1/, as they are unpacked.
        split: "train", "val" (dev) or "test" (test1).
    """
    root, name = Path(root), named_split(split, {"train": "train", "val": "dev", "test": "test1"}, "NLVR2")
    candidates = [folder / f"{name}.json" for folder in (root / "data", root / "nlvr2" / "data", root)]
    path = find_file("NLVR2", candidates, _NLVR2)
    listings: list[Listing] = []
    with schema(path, "NLVR2's"):
        for row in read_json_lines(path):
            pair, dash, _ = row["identifier"].rpartition("-")
            if not dash or row["label"] not in TRUTHS:
                raise ValueError(f"expected an identifier SET-PAIR-TEXT and {' or '.join(TRUTHS)}, got {row!s:.80}")
            left, right = (f"{pair}-img{i}.png" for i in (0, 1))
            label, text = (row["label"],), row["sentence"]
            listings.append(listing(row["identifier"], left, label, question=text, further=[right]))
    _expect_texts(listings, path)
    places = [base / name for base in (root / "images", root)]
    folders = [*places, *(below for place in places if place.is_dir() for below in sorted(place.iterdir()))]
    return records_on_disk(listings, folders, path, _NLVR2)


def nlvr2_statement(record: Record) -> Hashable:
    """What an example of NLVR2 shares with others of the same statement: its identifier without the number of the pair,
    as in the official evaluation of consistency.
    """
    parts = str(record.id).split("-")
    return (*parts[:2], *parts[3:])


def pairs_records(root: str | Path, split: str) -> list[Record]:
    """Your own texts with labels: `pairs.csv`, `.tsv` or `.jsonl` with the columns image, text and label; and if you
    like image2, kind, by which scores are reported separately, and split, one of train, val and test.

    Without splits a tenth of the photos is held out by what they show, as in `folder_records`; with two images a split
    must be named. Files are named relative to the folder, or to images/ in it, and nothing outside of it is read.

    Raises:
        DataError: there is no such table, a column or a file is missing, or there is no such split.
    """
    root = Path(root)
    path, rows = _pairs(root)
    files = files_inside([name for row, _ in rows for name in row.files], root)
    return records_of(path, [(row, its) for row, its in rows if files.keys() >= {*row.files}], files, split)


def pair_labels(root: str | Path) -> list[str]:
    """The labels of `pairs_records`, the most frequent first; raises `DataError` for fewer than two or too many."""
    path, rows = _pairs(Path(root))
    counts = Counter(row.captions[0] for row, _ in rows)
    if not 2 <= len(counts) <= MAX_LABELS:
        raise DataError(f"{path} has {len(counts)} different labels: expected 2 to {MAX_LABELS:,}")
    return sorted(counts, key=lambda label: (-counts[label], label))


def _pairs(root: Path) -> tuple[Path, list[Listed]]:
    """The table, and its rows, each with its split if it names one."""
    path = find_file("texts about images", [root / name for name in PAIRS], _HOW)
    rows: list[Listed] = []
    columns: dict[str, str] = {}
    of_kind = "kind"
    with schema(path, "the pairs'"):
        for number, row in enumerate(read_rows(path), start=1):
            if not columns:
                names = [*row.keys()]
                usual = {"image": IMAGE_COLUMNS, "text": TEXT_COLUMNS, "label": LABEL_COLUMNS}
                columns = {key: column(path, names, of, f"call it {of[0]}") for key, of in usual.items()}
                second, of_kind = named(names, SECOND_COLUMNS), named(names, ["kind"]) or "kind"
                columns |= {"second": second} if second else {}
            values = {}
            for key, name in columns.items():
                value = str(row[name]) if isinstance(row[name], int) else row[name]
                if not isinstance(value, str) or not value.strip():
                    raise TypeError(f"row {number} has {value!r:.80} as {name}, expected a text")
                values[key] = value.strip()
            further = (values["second"],) if "second" in columns else ()
            kind = row.get(of_kind)
            made = listing(number, values["image"], (values["label"],), kind or None, values["text"], further)
            rows.append((made, split_of(row, path)))
    if not rows:
        raise DataError(f"{path} holds no rows: {_HOW}")
    return path, rows


def _expect_texts(listings: list[Listing], path: Path) -> None:
    if not all(item.question.strip() for item in listings):
        raise DataError(f"{path} has examples without a text: download it again")

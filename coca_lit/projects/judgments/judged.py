"""Captions that people have judged, in the files that their authors publish.

`read_judgments` knows them by their content: Flickr8k's ExpertAnnotations.txt and CrowdFlowerAnnotations.txt (Hodosh et
al. 2013), Composite's *_correctness.csv and *_throughness.csv (Aditya et al. 2015), Pascal-50S's pair_pascal.mat with
consensus_pascal.mat beside it (Vedantam et al. 2015), and any table with columns for image, caption and grade.
"""

import csv
import math
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from coca_lit.data.datasets.annotations import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    MAX_BYTES,
    column,
    named,
    open_table,
    read_references,
    schema,
)
from coca_lit.data.records import Listing as ImageListing
from coca_lit.data.records import Record, not_found, records_on_disk
from coca_lit.errors import DataError
from coca_lit.projects.judgments.matlab import read_mat
from coca_lit.reading import printable, read_bounded

MAX_GRADES = 100_000  # each is compared with each
TOKENS = "Flickr8k.token.txt"
CONSENSUS = "consensus_pascal.mat"
PASCAL_REFERENCES = 5  # of 48, as in the literature, drawn once
# Of the two captions: both human and right, one human and wrong, one or both a machine's.
PASCAL_KINDS = {1: "HC", 2: "HI", 3: "HM", 4: "MM"}
COMPOSITE_URL, COMPOSITE_COLUMNS = 27, 34  # where its images are, and the fewest columns
COMPOSITE_USED = 3  # captions of each row; all studies leave out the fourth
GRADE_COLUMNS = ("grade", "rating", "score", "judgment", "judgement")
HOW = "name the file of the captions by --captions: Flickr8k.token.txt, COCO captions or Karpathy's dataset_*.json"


class Candidate(NamedTuple):
    """A caption beside an image, which people judged."""

    image: str  # name of the image's file without its ending
    caption: str


class Grade(NamedTuple):
    """A judge's opinion of a candidate."""

    candidate: int
    value: float
    judge: str


class Preference(NamedTuple):
    """Which of two candidates of an image people prefer."""

    better: int
    worse: int
    kind: str | None = None


class Judged(NamedTuple):
    """Judged captions.

    Attributes:
        name: of their file.
        candidates: without those that are left out; of an image and a caption there is one.
        references: image -> its references.
        grades: each a point of its own.
        preferences: of pairs; those without a majority are left out.
        votes: candidate -> numbers of yes and no of a crowd, if that is known.
        left_out: how many candidates or pairs.
        images: image -> the name of its file.
    """

    name: str
    candidates: Sequence[Candidate]
    references: Mapping[str, Sequence[str]]
    grades: Sequence[Grade] = ()
    preferences: Sequence[Preference] = ()
    votes: Mapping[int, tuple[int, int]] = {}
    left_out: int = 0
    why_left_out: str = ""
    images: Mapping[str, str] = {}

    def records(self, *folders: Path) -> list[Record]:
        """The judged images, with their references, from files in these folders."""
        judged = dict.fromkeys(candidate.image for candidate in self.candidates)
        listings = [ImageListing(image, self.images[image], tuple(self.references[image])) for image in judged]
        how = "put the judged images into one folder"
        return records_on_disk(listings, folders, Path(self.name), how)

    def of(self, images: Collection[int | str]) -> "Judged":
        """The candidates of these images alone."""
        return self.keeping(candidate for candidate in self.candidates if candidate.image in images)

    def keeping(self, candidates: Iterable[Candidate]) -> "Judged":
        """Some of the candidates alone, with their grades and preferences."""
        wanted = set(candidates)
        kept = [number for number, candidate in enumerate(self.candidates) if candidate in wanted]
        place = {number: new for new, number in enumerate(kept)}
        return self._replace(
            candidates=[self.candidates[number] for number in kept],
            grades=[g._replace(candidate=place[g.candidate]) for g in self.grades if g.candidate in place],
            preferences=[
                p._replace(better=place[p.better], worse=place[p.worse])
                for p in self.preferences
                if p.better in place and p.worse in place
            ],
            votes={place[number]: votes for number, votes in self.votes.items() if number in place},
        )


class _Collected:
    """Candidates as they are read, each once."""

    def __init__(self) -> None:
        self.numbers: dict[Candidate, int] = {}
        self.grades: list[Grade] = []

    def number(self, image: str, caption: str) -> int:
        return self.numbers.setdefault(Candidate(image, " ".join(caption.split())), len(self.numbers))

    def grade(self, image: str, caption: str, value: float, judge: str) -> int:
        if not math.isfinite(value):
            raise ValueError(f"a grade must be a number, got {value}")
        number = self.number(image, caption)
        self.grades.append(Grade(number, value, judge))
        if len(self.grades) > MAX_GRADES:
            raise ValueError(f"it holds more than {MAX_GRADES:,} grades, more than can be compared with each other")
        return number


def read_judgments(path: str | Path, captions: str | Path | None = None) -> Judged:
    """The judgements in a file of one of the known layouts.

    A caption that equals a reference of its image cannot be scored against it. Of Flickr8k's experts, and in a table of
    one's own, such candidates are left out, and of the crowd and Composite the reference is, as in Hessel et al. 2021.

    Args:
        captions: the references, and Flickr8k's judged captions: Flickr8k.token.txt, which is also looked for beside
            the judgements, COCO captions, or a file of Karpathy's, of all splits. Pascal-50S brings its own.

    Raises:
        DataError: it cannot be read, is of another layout, or an image has no references.
    """
    path = Path(path)
    if path.suffix == ".mat":
        return _pascal(path)
    if captions is None and (path.parent / TOKENS).is_file():
        captions = path.parent / TOKENS
    if captions is None:
        raise not_found(f"the references of {path.name}", [path.parent / TOKENS], HOW)
    known = _references(Path(captions))
    if path.suffix in (".tsv", ".parquet"):
        return _table(path, known)
    text = read_bounded(path, MAX_BYTES, "cannot be read").decode("utf-8-sig", errors="replace")
    head = text.partition("\n")[0]
    if head.count("\t") == 4 and "#" in head:
        return _flickr8k(path, text, known)
    if head.count(";") >= COMPOSITE_COLUMNS - 1:
        return _composite(path, text, known)
    return _table(path, known)


class _Known(NamedTuple):
    """Captions by image, the name of its file, and by the ids that Flickr8k gives them."""

    of_image: dict[str, list[str]]
    files: dict[str, str]
    by_id: dict[str, str]


def _references(path: Path) -> _Known:
    of_image: dict[str, list[str]] = defaultdict(list)
    files: dict[str, str] = {}
    if path.suffix != ".txt":
        of_id: dict[str, list[str]] = {}  # an id may be the name of another image's file, which goes first
        file_of_id: dict[str, str] = {}
        twice: set[str] = set()
        for item in read_references(path, None):
            texts = [" ".join(text.split()) for text in item.captions]
            of_image[stem(item.filename)] += texts
            of_id[str(item.id)] = texts
            file_of_id[str(item.id)] = item.filename
            if files.setdefault(stem(item.filename), item.filename) != item.filename:
                twice.add(stem(item.filename))
        for name in twice:  # images of several folders, which their ids alone tell apart
            del of_image[name], files[name]
        return _Known(of_id | of_image, file_of_id | files, {})
    by_id: dict[str, str] = {}
    text = read_bounded(path, MAX_BYTES, "cannot be read").decode("utf-8-sig", errors="replace")
    with schema(path, "the Flickr8k captions"):
        for line in filter(None, text.split("\n")):
            id, caption = line.split("\t")
            name = id.rpartition("#")[0]
            by_id[id] = caption = " ".join(caption.split())
            of_image[stem(name)].append(caption)
            files[stem(name)] = name
    return _Known(of_image, files, by_id)


def stem(name: str) -> str:
    """The name of an image's file without folders, address and ending."""
    return PurePosixPath(name.replace("\\", "/")).stem


def _judged(
    path: Path,
    found: _Collected,
    known: _Known,
    own: str,
    votes: Mapping[int, tuple[int, int]] | None = None,
    preferences: Sequence[Preference] = (),
) -> Judged:
    """All of a file. `own` says what is left out where a candidate equals a reference: "candidate" or "reference"."""
    candidates = list(found.numbers)
    if not candidates:
        raise DataError(f"{path} holds no judgements")
    judged = dict.fromkeys(candidate.image for candidate in candidates)
    if bare := [image for image in judged if not known.of_image.get(image)]:
        raise DataError(
            f"{len(bare)} of {len(judged)} judged images have no references, e.g. {printable(bare[0])!r}: {HOW}"
        )
    references = {image: list(known.of_image[image]) for image in judged}
    everything = Judged(
        path.name,
        candidates,
        references,
        found.grades,
        preferences,
        votes or {},
        images={image: known.files[image] for image in judged},
    )
    twice = [c for c in candidates if c.caption in references[c.image]]
    if own == "reference":
        for image, caption in twice:
            references[image] = [text for text in references[image] if text != caption]
        if bare := [image for image, texts in references.items() if not texts]:
            raise DataError(f"{path}: all references of {printable(bare[0])!r} are judged captions, none is left")
        return everything
    if len(twice) == len(candidates):
        raise DataError(f"all captions of {path} equal a reference of their image, so there is nothing to score")
    return everything.keeping(set(candidates) - set(twice))._replace(
        left_out=len(twice), why_left_out="equal to a reference"
    )


def _flickr8k(path: Path, text: str, known: _Known) -> Judged:
    """Lines of image, caption and three experts' grades from 1 to 4, or the share, number of yes and number of no."""
    found, votes = _Collected(), {}
    with schema(path, "Flickr8k's"):
        rows = [line.split("\t") for line in filter(None, text.split("\n"))]
        crowd = all(_is_share(*row[2:]) for row in rows)
        for image, id, *grades in rows:
            if id not in known.by_id:
                raise DataError(f"{path} judges caption {printable(id)!r}, whose text is unknown: {HOW}")
            if crowd:
                number = found.grade(stem(image), known.by_id[id], float(grades[0]), "crowd")
                votes[number] = (int(grades[1]), int(grades[2]))
                continue
            if len(grades) != 3:
                raise ValueError(f"expected three grades, got {len(grades)}")
            for judge, value in enumerate(grades, start=1):
                found.grade(stem(image), known.by_id[id], float(value), f"expert {judge}")
    return _judged(path, found, known, "reference" if crowd else "candidate", votes)


def _is_share(share: str = "", yes: str = "", no: str = "", *more: str) -> bool:
    """Whether the first number is the share of the second in both: no grades from 1 to 4 are."""
    total = int(yes) + int(no)
    return not more and total > 0 and abs(float(share) - int(yes) / total) < 1e-5


def _composite(path: Path, text: str, known: _Known) -> Judged:
    """Rows with the address of an image, its three or four captions, and a grade from 1 to 5 for each."""
    found = _Collected()
    with schema(path, "Composite's"):
        try:
            rows = list(csv.reader(StringIO(text, newline=""), delimiter=";"))[1:]
        except csv.Error as error:
            raise ValueError(str(error)) from error
        for row in rows:
            if len(row) < COMPOSITE_COLUMNS or not row[COMPOSITE_URL]:  # the files end with empty rows
                continue
            image, rest = stem(row[COMPOSITE_URL]), row[COMPOSITE_URL + 1 :]
            count = 3 if _is_number(rest[3]) else 4
            if len(rest) < 2 * count:
                raise ValueError(f"expected {count} captions and their grades, got {rest!r:.80}")
            for place in range(COMPOSITE_USED):
                found.grade(image, rest[place], float(rest[count + place]), "")
    return _judged(path, found, known, "reference")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _table(path: Path, known: _Known) -> Judged:
    """A table with columns for image, caption and grade, and perhaps "judge" and "pair": of two rows of a pair, the one
    with the higher grade is preferred.
    """
    columns, rows = open_table(path)
    how = "rename a column"
    image, caption, grade = (
        column(path, columns, usual, how) for usual in (IMAGE_COLUMNS, CAPTION_COLUMNS, GRADE_COLUMNS)
    )
    judges, paired = (named(columns, [key]) or key for key in ("judge", "pair"))
    found = _Collected()
    pairs: dict[str, list[tuple[int, float]]] = defaultdict(list)
    with schema(path, "the table's"):
        for row in rows:
            value = float(row[grade])
            name = str(row[image])
            name = name if name in known.of_image else stem(name)
            judge, pair = ("" if row.get(key) is None else str(row[key]) for key in (judges, paired))
            number = found.grade(name, row[caption], value, judge)
            if pair:
                pairs[pair].append((number, value))
    candidates, preferences = list(found.numbers), []
    for pair, members in pairs.items():
        if len(members) != 2:
            raise DataError(f"{path}: the pair {printable(pair)!r} has {len(members)} rows, expected two")
        (first, one), (second, other) = members
        if candidates[first].image != candidates[second].image:
            raise DataError(f"{path}: the pair {printable(pair)!r} is of two images, expected two captions of one")
        if one != other and first != second:
            preferences.append(Preference(first, second) if one > other else Preference(second, first))
    return _judged(path, found, known, "candidate", preferences=preferences)


def _pascal(path: Path) -> Judged:
    """4,000 pairs of captions, each judged against 48 references: which one is more like it? The majority counts.

    Five of the 48 references are those of the score, drawn once for each image.
    """
    pairs, votes = read_mat(path), read_mat(path.parent / CONSENSUS)
    found, references, files = _Collected(), {}, {}
    preferences: list[Preference] = []
    left_out = 0
    with schema(path, "Pascal-50S's"):
        rows, kinds, triplets = pairs["new_input"], pairs["category"].flatten(), votes["triplets"]
        each = len(triplets) // max(len(rows), 1)
        if not each or each * len(rows) != len(triplets) or len(kinds) != len(rows):
            raise ValueError(f"{len(rows)} pairs, {len(kinds)} kinds and {len(triplets)} triplets do not fit")
        for number, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
            name, *texts = (_text(value) for value in list(row.values())[:3])
            image = stem(name)
            first, second = (found.number(image, text) for text in texts)
            seen: list[tuple[str, int]] = []  # reference, and 1 if the first caption is more like it, else -1
            for triplet in triplets[number * each : (number + 1) * each]:
                reference, _, _, winner = triplet.values()
                if winner.size != 1 or winner.item() not in (1, -1):
                    raise ValueError(f"expected a winner, 1 or -1, got {winner!r:.80}")
                seen.append((" ".join(_text(reference).split()), int(winner.item())))
            if image not in references:
                own = list(dict.fromkeys(reference for reference, _ in seen))
                drawn = random.Random(image)
                references[image], files[image] = drawn.sample(own, min(PASCAL_REFERENCES, len(own))), name
            balance = sum(winner for _, winner in seen)
            if balance == 0 or first == second:
                left_out += 1
                continue
            better, worse = (first, second) if balance > 0 else (second, first)
            preferences.append(Preference(better, worse, PASCAL_KINDS.get(int(kind))))
    return Judged(
        path.name, list(found.numbers), references, (), preferences, {}, left_out, "without a majority", files
    )


def _text(value: Any) -> str:
    """A text, perhaps in cells."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r:.80}")
    return value

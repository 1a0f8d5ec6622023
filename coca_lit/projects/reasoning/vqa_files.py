"""VQAv2 (Goyal et al. 2017, arXiv 1612.00837): questions about COCO images, ten answers to each, in the official files.

ROOT/v2_OpenEnded_mscoco_train2014_questions.json    ROOT/v2_mscoco_train2014_annotations.json    ROOT/train2014/
"""

import re
import sys
from collections import Counter
from pathlib import Path

from coca_lit.data.datasets.annotations import MAX_BYTES, check_id, find_file, listing, named_split, schema
from coca_lit.data.datasets.captions import FOLDERS, names_on_disk
from coca_lit.data.records import Record, records_on_disk
from coca_lit.projects.reasoning.accuracy import normalize_answer
from coca_lit.projects.reasoning.scene_questions import scene_question_records
from coca_lit.reading import read_json

SPLITS = {"train": "train2014", "val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}
_HOW = (
    "download questions and annotations of VQA v2 from visualqa.org and COCO's images of 2014 (test: 2015) from "
    "cocodataset.org, and unpack them in one folder"
)


def vqa_records(root: str | Path, split: str) -> list[Record]:
    """A record for each question of "train", "val", "test-dev" or "test"; the last two have no answers.

    The most frequent answer comes first, "the" answer of VQA; the type of the answer (yes-no, number, other) is the
    domain.
    """
    root = Path(root)
    path = _file(root, "questions", split)
    answers = _answers(_file(root, "annotations", split)) if split in ("train", "val") else {}
    content = read_json(path, limit=MAX_BYTES)
    with schema(path, "the VQA questions"):
        folder = content["data_subtype"].replace("test-dev", "test")  # the same images
        if not re.fullmatch(r"\w{1,40}", folder):
            raise ValueError(f"data_subtype {folder!r:.80} names no folder")
        listings = []
        for question in content["questions"]:
            people, kind = answers.get(question["question_id"], ((), None))
            filename = f"COCO_{folder}_{question['image_id']:012d}.jpg"
            listings.append(listing(question["question_id"], filename, people, kind, question["question"]))
    folders = [base / name for base in (root, root / "images") for name in (folder, *FOLDERS)]
    if folder != "test2015":  # whose photos have one name
        listings = names_on_disk(listings, folders)
    return records_on_disk(listings, folders, path, _HOW)


def frequent_answers(root: str | Path | None = None, count: int = 3129) -> list[str]:
    """The most frequent answers to the training questions, normalised; without a `root` of the built-in scenes.

    The default is the usual number: answers that occur more than eight times in training (Teney et al. 2017).
    """
    if root is None:
        answers = [record.captions[0] for record in scene_question_records("train")]
    else:
        answers = [people[0] for people, _ in _answers(_file(Path(root), "annotations", "train")).values()]
    counts = Counter(map(normalize_answer, answers))
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:count]


def _file(root: Path, kind: str, split: str) -> Path:
    task = "OpenEnded_mscoco" if kind == "questions" else "mscoco"
    name = f"v2_{task}_{named_split(split, SPLITS, 'VQA v2')}_{kind}.json"
    return find_file(f"the {kind} of VQA v2", [root / name, root / "annotations" / name], _HOW)


def _answers(path: Path) -> dict[int | str, tuple[tuple[str, ...], str]]:
    """By question: the answers, most frequent first, and their type."""
    content = read_json(path, limit=MAX_BYTES)
    found: dict[int | str, tuple[tuple[str, ...], str]] = {}
    with schema(path, "the VQA annotations"):
        for item in content["annotations"]:
            people = [sys.intern(answer["answer"]) for answer in item["answers"]]  # a few texts make up millions
            ranks = {answer: (answer != item["multiple_choice_answer"], -people.count(answer)) for answer in people}
            ordered = sorted(people, key=lambda answer: (ranks[answer], answer))
            kind = sys.intern(item["answer_type"].replace("/", "-"))  # a slash separates the parts of a score's name
            found[check_id(item["question_id"])] = tuple(ordered), kind
    return found

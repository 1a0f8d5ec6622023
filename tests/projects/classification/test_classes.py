"""Folders of classes as labels and as texts; records of several sources."""

import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from coca_lit.data.datasets.classification import scene_classes
from coca_lit.data.records import Record
from coca_lit.errors import DataError
from coca_lit.projects.classification.classes import class_labels, class_records, scene_class_records
from coca_lit.projects.classification.mixture import weighted_records


def test_a_folder_of_classes_becomes_captions(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("big_dog", "cat"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "1.png")
    texts = {record.id: record.captions for record in class_records(tmp_path, "train", as_text=True)}
    assert texts == {"big_dog/1.png": ("a photo of a big dog.",), "cat/1.png": ("a photo of a cat.",)}
    labels = {record.id: record.captions for record in class_records(tmp_path, "val")}
    assert labels == {"big_dog/1.png": ("big dog",), "cat/1.png": ("cat",)}
    assert class_labels(tmp_path) == ["big dog", "cat"]


def test_labels_are_distinct_where_names_are_not() -> None:
    labels = class_labels("/nowhere", "imagenet")
    assert len(set(labels)) == len(labels) == 1000
    assert {"missile (657)", "missile (744)"} <= set(labels)
    assert sum(re.search(r" \(\d+\)$", label) is not None for label in labels) == 4


def test_scenes_with_a_class_are_trained_on_or_scored() -> None:
    trained, scored = ({record.id for record in scene_classes(trained=which).records} for which in (True, False))
    assert trained
    assert not trained & scored
    assert len(trained | scored) == 2 * 48 * 2 * 2  # rows and columns of each kind, either thing small or large
    assert {record.id for record in scene_class_records("train")} == trained
    assert not scene_class_records("val")


# Several sources


def source(name: str, count: int):
    return lambda split: [Record(i, lambda: None, f"{name} {split} {i}") for i in range(count)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_shares_are_those_of_the_weights(share: float) -> None:
    sources = {"pairs": source("a", 90), "classes": source("b", 30)}
    records = weighted_records("train", sources, {"pairs": 1 - share, "classes": share})
    assert len({record.id for record in records}) == len(records)
    counts = Counter(record.captions[0].split()[0] for record in records)
    assert counts["b"] / len(records) == pytest.approx(share, abs=0.01)
    for letter, count in (("a", 90), ("b", 30)):
        times = Counter(record.captions[0] for record in records if record.captions[0].startswith(letter))
        assert len(times) == min(count, counts[letter])
        assert max(times.values()) - min(times.values()) <= 1
    assert min(counts["a"] / 90, counts["b"] / 30) == 1 or counts["a"] == 90 or counts["b"] == 30


def test_validation_is_the_first_source_alone() -> None:
    sources = {"pairs": source("a", 9), "classes": source("b", 3)}
    records = weighted_records("val", sources, {"pairs": 1, "classes": 9})
    assert [record.captions[0] for record in records] == [f"a val {i}" for i in range(9)]


@pytest.mark.parametrize(
    ("sources", "weights", "said"),
    [
        ({"a": source("a", 1)}, {"b": 1}, "weights are of b, and sources a"),
        ({"a": source("a", 1)}, {"a": 0}, "above 0"),
        ({"a": source("a", 0)}, {"a": 1}, "source a has no training records"),
    ],
)
def test_wrong_sources(sources, weights, said: str) -> None:
    with pytest.raises(DataError, match=said):
        weighted_records("train", sources, weights)

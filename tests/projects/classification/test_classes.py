"""Folders of classes as labels and as texts."""

import re
from pathlib import Path

from PIL import Image

from coca_lit.data.datasets.classification import scene_classes
from coca_lit.projects.classification.classes import class_labels, class_records, scene_class_records


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

"""Every reader of JSON and pictures: files that are none, and JSON that is not what it should be."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from coca_lit.data.datasets.captions import coco_folder_records
from coca_lit.data.records import ImageFile
from coca_lit.data.shards.listing import find_shards
from coca_lit.data.shards.shard import MANIFEST
from coca_lit.data.transforms import load_pixels
from coca_lit.errors import DataError
from coca_lit.reading import read_run_npz, read_run_yaml
from coca_lit.tools.caption.outputs import open_writer
from coca_lit.tools.prepare.check import JOURNAL as CHECK_JOURNAL
from coca_lit.tools.prepare.check import check_shards
from coca_lit.tools.prepare.write import JOURNAL, prepare
from coca_lit.tools.report.runs import read_run
from coca_lit.tools.search.index import ImageIndex
from helpers.hostile import Evil, good
from helpers.shards import write_tar


def _captions(folder: Path) -> object:
    return open_writer(str(folder / "out.jsonl"), [], {})


def here(function, items, shared):
    """Works through the items in this process."""
    return (function(item, shared) for item in items)


READERS: dict[str, Callable[[Path], object]] = {
    MANIFEST: lambda folder: find_shards(str(folder)),
    CHECK_JOURNAL: lambda folder: [*check_shards([write_tar(folder / "x.tar", good())], "txt", here)],
    JOURNAL: lambda folder: [*prepare([], folder, here)],
    "captions.json": lambda folder: coco_folder_records(folder),
    "results.json": lambda folder: read_run(folder),
    "out.jsonl": _captions,
    "out.jsonl.settings.json": _captions,
    "x.safetensors": lambda folder: ImageIndex.load(folder / "x.safetensors", None),
    "x.jpg": lambda folder: ImageFile(folder / "x.jpg")(),
    "x.png": lambda folder: load_pixels(ImageFile(folder / "x.png")),
}


@pytest.mark.parametrize("name", READERS)
def test_a_fifo_does_not_block(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=re.escape(name)):
        READERS[name](tmp_path)


ODD = {
    "list": "[]",
    "number": "7",
    "deep": "[" * 100_000,
    "digits": "1" * 10_000,
    "surrogate": '"\\ud800"',
    "rows": '{"shards": [[1]], "images": [7], "annotations": [[]], "a": {}}',
    "numbers": '{"shards": [{"name": "x.tar", "samples": 1e999, "bytes": 1, "sha256": ""}], "images": 1e999, "a": "b"}',
    "huge": '{"shards": [{"name": "x.tar", "samples": 1' + "0" * 300 + ', "bytes": 1, "sha256": ""}], "a": null}',
    "torn": '{"a": ',
    "not unicode": "\udcff",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
@pytest.mark.parametrize("name", [MANIFEST, "captions.json", "results.json", "out.jsonl.settings.json"])
def test_odd_json_is_one_sentence(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"^[^\n]+$") as error:
        READERS[name](tmp_path)
    assert name in str(error.value) or "a=" in str(error.value)


def test_arrays_are_never_objects(tmp_path):
    arrays = {"numbers": np.zeros(3), "texts": np.array(["a", "bc"])}
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    found = read_run_npz(tmp_path, "x.npz")
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    np.savez(tmp_path / "x.npz", objects=np.array([Evil(tmp_path / "ran")], dtype=object))
    with pytest.raises(DataError, match=r"x\.npz is not a readable \.npz file: .*allow_pickle"):
        read_run_npz(tmp_path, "x.npz")
    np.save((tmp_path / "x.npz").open("wb"), np.zeros(3))
    with pytest.raises(DataError, match=r"x\.npz is not a readable \.npz file"):
        read_run_npz(tmp_path, "x.npz")
    assert not (tmp_path / "ran").exists()


def test_a_configuration_may_hold_a_large_tokenizer(tmp_path):
    config = {"model": {"net": {"tokenizer": {"packed": "eNq+/" * 2**20, "start": "<s>"}}}}
    (tmp_path / "x.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    assert read_run_yaml(tmp_path, "x.yaml") == config


ODD_YAML = {
    "code": "a: !!python/object/apply:os.getcwd []",
    "circle": "a: &a [*a]",
    "deep": "a: " + "[" * 9_000 + "]" * 9_000,
    "date": "a: 2020-01-01",
    "digits": "a: " + "1" * 30,
    "list": "[1]",
    "another tag": "a: !whatever 1",
    "torn": "a: [1, {",
    "no text": "a: \udcff",
    "control": "a: \x1b[2J",
}


@pytest.mark.parametrize("text", ODD_YAML.values(), ids=ODD_YAML)
def test_odd_yaml_is_one_sentence(tmp_path, text):
    (tmp_path / "x.yaml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"^[^\n]*x\.yaml [^\n]+$"):
        read_run_yaml(tmp_path, "x.yaml")

"""Every reader of JSON and pictures: files that are none, and JSON that is not what it should be."""

import os
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from coca_lit.data.datasets.captions import coco_folder_records
from coca_lit.data.records import ImageFile
from coca_lit.data.shards.listing import find_shards
from coca_lit.data.shards.shard import MANIFEST
from coca_lit.data.text_batches import read_texts
from coca_lit.data.transforms import load_pixels
from coca_lit.errors import DataError
from coca_lit.reading import read_run_npz, read_run_yaml
from coca_lit.tools.caption.outputs import open_writer
from coca_lit.tools.prepare.check import JOURNAL as CHECK_JOURNAL
from coca_lit.tools.prepare.check import check_shards
from coca_lit.tools.prepare.write import JOURNAL, prepare
from coca_lit.tools.report.runs import read_run
from coca_lit.tools.search.index import ImageIndex
from helpers.hostile import good
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
    "texts.jsonl": lambda folder: read_texts(str(folder / "texts.jsonl")),
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


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_arrays_compressed_in_another_way_than_numpy_does(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.writestr("a.npy", bytes(1000))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[40:60] = bytes(20)  # damaged as well, for which those two have errors of their own
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz is not a readable \.npz file: a\.npy is compressed in another way"):
        read_run_npz(tmp_path, "x.npz")


@pytest.mark.parametrize("kind", ["float32", "int16", "bool", "U3", "S3", "complex64", "datetime64[s]", "V3"])
def test_arrays_of_numbers_and_texts_alone(tmp_path, kind):
    array = np.zeros(3, kind)
    np.savez(tmp_path / "x.npz", a=array)
    if kind in ("complex64", "datetime64[s]", "V3"):
        with pytest.raises(DataError, match=r"a\.npy holds .*neither numbers nor texts"):
            read_run_npz(tmp_path, "x.npz")
    else:
        np.testing.assert_array_equal(read_run_npz(tmp_path, "x.npz")["a"], array)


def test_a_configuration_may_hold_a_large_tokenizer_and_not_many_values(tmp_path):
    config = {"model": {"net": {"tokenizer": {"packed": "eNq+/" * 2**20, "start": "<s>"}}}}
    (tmp_path / "x.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    assert read_run_yaml(tmp_path, "x.yaml") == config
    (tmp_path / "x.yaml").write_text(f"values: [{'1,' * 2**18}]")
    with pytest.raises(DataError, match=r"x\.yaml holds more than 262,144 values"):
        read_run_yaml(tmp_path, "x.yaml")


def test_numbers_in_base_60(tmp_path):
    (tmp_path / "x.yaml").write_text("time: 1:30\nnote: 'a:b:c'\n")
    assert read_run_yaml(tmp_path, "x.yaml") == {"time": 90, "note": "a:b:c"}
    for long in ("1" + ":59" * 200_000, "!!int '1" + " :5" * 200_000 + "'"):
        (tmp_path / "x.yaml").write_text(f"time: {long}\n")
        begun = time.process_time()
        with pytest.raises(DataError, match=r"x\.yaml has a number in base 60 of more than 64 digits"):
            read_run_yaml(tmp_path, "x.yaml")
        assert time.process_time() - begun < 5
    text = "1" + ":1" * 64 + "1" * 100_000 + "x"
    (tmp_path / "x.yaml").write_text(f"text: {text}\n")
    begun = time.process_time()
    assert read_run_yaml(tmp_path, "x.yaml") == {"text": text}
    assert time.process_time() - begun < 5

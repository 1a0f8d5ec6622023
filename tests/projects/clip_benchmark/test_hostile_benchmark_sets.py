"""Data sets in CLIP_benchmark's layout that a stranger has written are refused in one sentence."""

import pickle
from pathlib import Path

import pytest

from coca_lit.errors import DataError
from coca_lit.projects.clip_benchmark.sets import classified_shards
from helpers.shards import jpeg, write_tar


def benchmark_set(folder: Path, member: str = "a.cls", label: bytes = b"0", shards: str = "1") -> Path:
    """A data set in CLIP_benchmark's layout with one image."""
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("dog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    (folder / "test" / "nshards.txt").write_text(shards)
    write_tar(folder / "test" / "0.tar", {"a.jpg": jpeg(), member: label})
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"member": "../a.cls"}, "the member '../a.cls' leads out of the shard"),
        ({"label": b"7"}, "must be a whole number below 1, got '7'"),
        ({"shards": "9" * 5000}, "number of shards .* must be a whole number below"),
        ({"member": "a.pickle", "label": pickle.dumps(0)}, "sample a lacks its image or its .cls"),
    ],
)
def test_data_sets_of_evaluations(tmp_path, change, said):
    assert len(classified_shards(benchmark_set(tmp_path / "good")).records) == 1
    with pytest.raises(DataError, match=said):
        classified_shards(benchmark_set(tmp_path / "bad", **change))

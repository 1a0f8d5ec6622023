"""`conditions.json` of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from coca_lit.errors import DataError
from coca_lit.metrics.uncertainty import Conditions
from coca_lit.runs.results import CONDITIONS, read_conditions, write_conditions

ROW = {"split": "test", "images": 64, "image_digest": "a", "texts": 320, "text_digest": "b", "settings": {"rerank": 4}}


def test_conditions_come_back(tmp_path: Path) -> None:
    first, second = Conditions(**ROW), Conditions(**ROW | {"settings": {}})
    known = {"x/CIDEr": first, "x/METEOR": first, "x/t2i_recall@1": second}
    write_conditions(tmp_path, known)
    assert read_conditions(tmp_path) == known
    assert len(json.loads((tmp_path / CONDITIONS).read_text())) == 2  # equal ones are written once


def test_a_run_without_conditions(tmp_path: Path) -> None:
    assert read_conditions(tmp_path) == {}


@pytest.mark.parametrize(
    "content",
    [
        {"x": 1},
        [1],
        [{**ROW}],
        [{"scores": "x/CIDEr", **ROW}],
        [{"scores": [1], **ROW}],
        [{"scores": ["x"], **ROW, "images": "64"}],
        [{"scores": ["x"], **ROW, "settings": [1]}],
        [{"scores": ["x"], **ROW, "more": 1}],
    ],
)
def test_what_no_run_writes_is_one_sentence(tmp_path: Path, content: Any) -> None:
    (tmp_path / CONDITIONS).write_text(json.dumps(content))
    with pytest.raises(DataError, match=CONDITIONS):
        read_conditions(tmp_path)

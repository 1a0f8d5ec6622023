"""Files of texts that a stranger has written are read, or refused in one sentence."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coca_lit.errors import DataError
from coca_lit.projects.texts.files import read_texts
from helpers.fuzzing import bounded, forged, fuzz


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "texts.jsonl")
    with pytest.raises(DataError, match=r"texts\.jsonl"):
        read_texts(str(tmp_path / "texts.jsonl"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.slow
@fuzz
@given(st.data())
def test_forged_texts(folder: Path, data: st.DataObject) -> None:
    (folder / "texts.jsonl").write_bytes(data.draw(forged({"text": "a dog"})))
    with bounded():
        read_texts(str(folder / "texts.jsonl"))

"""Texts without images: their files, their order, their place between batches of pairs, and in a resumed run."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coca_lit.data.datamodule import ScenesDataModule
from coca_lit.errors import DataError
from coca_lit.models.presets import VOCABULARIES
from coca_lit.projects.texts.batches import TextBatches, TextsBetweenPairs
from coca_lit.projects.texts.files import read_texts
from coca_lit.tokenizer import WordTokenizer
from helpers.fuzzing import bounded, forged, fuzz
from helpers.scene_files import write_data_set

TOKENIZER = WordTokenizer(VOCABULARIES["scenes"])
SMALL = {"tokenizer": TOKENIZER, "batch_size": 4, "image_size": 16}
LINES = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("ring", "star", "cross")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path


def test_files_of_every_kind(tmp_path: Path, file: Path) -> None:
    (tmp_path / "more.jsonl").write_text('"a text"\n\n{"text": " a star ", "url": "…"}\n{"caption": "a ring"}\n')
    write_data_set("karpathy", tmp_path / "karpathy", count=8, size=8)
    write_data_set("coco", tmp_path / "coco", count=8, size=8)
    assert read_texts(str(file)) == LINES
    assert read_texts([str(tmp_path / "more.jsonl"), str(file)])[:4] == ["a text", "a star", "a ring", LINES[0]]
    assert read_texts(f"{tmp_path}/*.txt") == LINES
    assert len(read_texts(f"{tmp_path}/karpathy/dataset_coco.json")) == 8 * 5  # of the training split alone
    assert len(read_texts(f"{tmp_path}/coco/annotations/captions_train2017.json")) == 8 * 5


@pytest.mark.parametrize(("name", "content"), [("x.txt", "a star\na ring\n"), ("x.jsonl", '"a star"\n"a ring"\n')])
def test_the_mark_that_windows_puts_first_is_no_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_texts(str(tmp_path / name)) == ["a star", "a ring"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "\n", "hold no text"),
        ("a.jsonl", "{", r"a\.jsonl, text 1 is not JSON"),
        ("a.jsonl", '"x"\n{"words": 1}', r'a\.jsonl, text 2: expected a text, or an object with "text" or "caption"'),
        ("a.jsonl", '{"words": "\u202e"}', r'got \{"words": "\\u202e"\}'),
        ("a.csv", "x", "neither a .txt, a .jsonl nor a caption file"),
        ("a.json", "[]", "does not follow"),
    ],
)
def test_wrong_files_are_one_sentence(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        read_texts(f"{tmp_path}/{name}")


def texts_of(batches: list) -> list[str]:
    return [TOKENIZER.decode(row) for batch in batches for row in batch.tokens]


def test_a_pass_holds_every_text_once_in_a_new_order(file: Path) -> None:
    texts = TextBatches(str(file), TOKENIZER, batch_size=3, image_size=16, seed=1)
    assert len(texts) == 3
    first, second = (texts_of([texts.batch(n) for n in range(start, start + 3)]) for start in (0, 3))
    assert sorted(first) == sorted(second) == sorted(LINES)
    assert first != second
    batch = texts.batch(0)
    assert batch.images.shape == (0, 3, 16, 16)
    assert batch.lengths.tolist() == [5, 5, 5]


@pytest.mark.parametrize(("every", "kinds"), [(1, "tt"), (2, "ptptptpt"), (3, "pptppt"), (9, "pppp")])
def test_texts_come_at_every_nth_step(file: Path, every: int, kinds: str) -> None:
    data = ScenesDataModule(**SMALL, train_count=16, batch_schedule=TextsBetweenPairs(str(file), every))
    loader = data.train_dataloader()
    batches = list(loader)
    assert "".join("p" if len(batch.images) else "t" for batch in batches) == kinds
    assert len(loader) == len(batches)
    alone = [batch.keys for batch in ScenesDataModule(**SMALL, train_count=16).train_dataloader()]
    assert [batch.keys for batch in batches if len(batch.images)] == (alone if every > 1 else [])


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_resumed_run_sees_the_same_batches(file: Path, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ScenesDataModule(**SMALL, train_count=16, batch_schedule=TextsBetweenPairs(str(file), every))
    for epoch in (0, 1):
        monkeypatch.setattr(data, "position", lambda epoch=epoch: (epoch, 0))
        whole = list(data.train_dataloader())
        for done in range(len(whole)):
            monkeypatch.setattr(data, "position", lambda at=(epoch, done): at)
            rest = list(data.train_dataloader())
            assert [batch.keys for batch in rest] == [batch.keys for batch in whole[done:]]
            assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(rest, whole[done:], strict=True))


# Files of strangers


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "texts.jsonl")
    with pytest.raises(DataError, match=r"texts\.jsonl"):
        read_texts(str(tmp_path / "texts.jsonl"))


@pytest.mark.slow
@fuzz
@given(st.data())
def test_forged_texts(forged_files: Path, data: st.DataObject) -> None:
    (forged_files / "texts.jsonl").write_bytes(data.draw(forged({"text": "a dog"})))
    with bounded():
        read_texts(str(forged_files / "texts.jsonl"))

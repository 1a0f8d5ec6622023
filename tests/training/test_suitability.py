"""Doomed data are named before the first step."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from coca_lit.data import Record
from coca_lit.data.datamodule import RecordsDataModule
from coca_lit.data.scenes.render import render
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.errors import DataError
from coca_lit.models import create_model
from coca_lit.tokenizer import WordTokenizer, get_tokenizer
from coca_lit.training.suitability import check_captions, check_data, check_held_out, check_images
from helpers.shards import jpeg, write_tar

WORDS = WordTokenizer(["a", "dog"], context_length=6)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_unknown_words(capsys: pytest.CaptureFixture[str]) -> None:
    check_captions(["a dog a dog"] * 19 + ["a dog a cat"], WORDS)
    assert said(capsys) == ""
    check_captions(["a dog a dog"] * 3 + ["a dog cat a"], WORDS)
    assert "6%" in (text := said(capsys))
    assert "cat" in text
    with pytest.raises(DataError, match="75%"):
        check_captions(["a black cat runs"], WORDS)
    check_captions(["a black cat runs"], get_tokenizer("clip"))
    assert said(capsys) == ""


def test_long_captions(capsys: pytest.CaptureFixture[str]) -> None:
    check_captions(["a dog"] * 3 + ["a dog a dog a"], WORDS)
    assert "25%" in (text := said(capsys))
    assert "context_length=7" in text
    check_captions(["a dog a dog"], WORDS)  # with start and end just as long as the context
    assert said(capsys) == ""


def test_images(capsys: pytest.CaptureFixture[str]) -> None:
    different = [Record(i, partial(render, i, size=40), "a") for i in range(8)]
    check_images(different, 80)
    check_images(different, 224, takes_squares=False)
    assert said(capsys) == ""
    check_images(different, 81)
    assert "40 pixels" in said(capsys)
    with pytest.raises(DataError, match="same image"):
        check_images([Record(i, partial(Image.new, "RGB", (32, 32), "red"), "a") for i in range(8)], 32)
    few = [Record(i, partial(Image.new, "RGB", (32, 32), "red" if i < 20 else "blue"), "a") for i in range(30)]
    check_images(few, 32)  # the first ones are equal, as they may be by chance


def test_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = create_model("coca_tiny", tokenizer=["a", "dog"], image_size=64, context_length=6)
    given = {"tokenizer": net.tokenizer, "batch_size": 2}

    def check(*samples: tuple[int, str]) -> None:
        files = {f"{i}.jpg": jpeg(shade) for i, (shade, _) in enumerate(samples)}
        files |= {f"{i}.txt": caption.encode() for i, (_, caption) in enumerate(samples)}
        write_tar(tmp_path / "00000.tar", dict(sorted(files.items())))
        check_data(LAIONDataModule(str(tmp_path / "00000.tar"), None, **given), net)

    with pytest.raises(DataError, match="same image"):
        check(*[(0, "a dog")] * 10)
    check(*[(0, "a dog a dog a")] * 4, *[(200, "a dog")] * 6)
    assert "40%" in (text := said(capsys))
    assert "18 pixels" in text
    with pytest.raises(DataError, match="75%"):
        check(*[(0, "a black cat runs")] * 4)


def test_captions_longer_than_generated_ones(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["一个穿着红色上衣的女人站在街道上", "a dog", "两个孩子在海滩上玩一个黄色的大球"]
    records = [Record(i, partial(render, i), text) for i, text in enumerate(texts)]
    net = create_model("coca_tiny", tokenizer="clip", context_length=76)
    data = RecordsDataModule({"train": records}, tokenizer=net.tokenizer, batch_size=2)
    need = max(net.tokenizer.lengths(texts))
    check_data(data, net)
    assert f"scoring.generate.max_length={need}" in (text := said(capsys))
    assert "no blanks between words" in text
    for given in ({"max_length": need}, {"max_length": need + 3}):
        check_data(data, net, given)
        assert "max_length" not in said(capsys)


def test_pairs_of_images_have_no_caption_each() -> None:
    pairs = [Record(i, partial(render, i), "true", question="?", further=[partial(render, i + 1)]) for i in range(4)]
    net = create_model("coca_tiny", tokenizer=["true"])
    data = RecordsDataModule(lambda split: pairs, tokenizer=net.tokenizer, batch_size=2)
    check_data(data, net)
    with pytest.raises(DataError, match=r"model\.caption_weight=0"):
        check_data(data, net, of_pairs=True)


def test_questions_of_unknown_words() -> None:
    net = create_model("coca_tiny", tokenizer=["a", "dog"])
    records = [Record(i, partial(render, i), "a dog", question="what eats a dog") for i in range(4)]
    with pytest.raises(DataError, match="50%"):
        check_data(RecordsDataModule({"train": records}, tokenizer=net.tokenizer, batch_size=2), net)


def test_photos_on_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(6):
        render(i, size=48).save(tmp_path / f"{i}.png")
    shutil.copy(tmp_path / "1.png", tmp_path / "copy.png")
    photos = {name: Record(name, tmp_path / f"{name}.png", "a") for name in [*"012345", "copy"]}
    training = [photos["0"], photos["1"], Record("scene", partial(render, 0), "a")]
    check_held_out(training, {"mine": [photos["2"], photos["3"]], "scenes": [Record(1, partial(render, 0), "a")]})
    assert said(capsys) == ""
    check_held_out(training, {"mine": [photos["0"], photos["2"]], "other": [photos["3"], photos["copy"], photos["4"]]})
    first, second = said(capsys).splitlines()
    assert "1 of 2 photos of mine" in first
    assert "1 of 3 photos of other" in second
    assert "copy.png" in second

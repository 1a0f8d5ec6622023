"""Readers of other kinds of input than images, as a project would declare them."""

import pickle
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from coca_lit import extensions
from coca_lit.data.inputs import IMAGES, ImageReader, chosen_reader, reader_of, source_of
from coca_lit.data.records import ImageFile, Record
from coca_lit.data.shards.sample import member_kinds, read_limit
from coca_lit.data.sources import ImageSource
from coca_lit.data.transforms import RandomCrop, augmented, loaded
from coca_lit.tools.search.index import readable_endings


class Halves(ImageSource):
    """The left and the right half of a picture of two squares."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> Image.Image:
        with Image.open(self.path, formats=["PPM"]) as picture:
            return picture.convert("RGB")

    def transformed(self, transform):
        picture = self()
        width, height = picture.size
        return torch.stack([transform(picture.crop((x, 0, x + width // 2, height))) for x in (0, width // 2)])


class HalvesReader(ImageReader):
    kind = "pair of halves"
    endings = (".ppm",)
    suffixes = ("ppm",)

    def __init__(self, halves: int) -> None:
        self.leading = (halves,)

    def file(self, path: Path) -> ImageSource:
        return Halves(path)


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    target = f"{__name__}:HalvesReader"
    tables = {"inputs": {".ppm": target, ".mine": f"{__name__}:ImageReader"}}
    options = {"halves": extensions.InputOption(target, 2, "of a picture")}
    monkeypatch.setattr(extensions, "declared", tables.__getitem__)
    monkeypatch.setattr(extensions, "input_options", lambda: options)
    member_kinds.cache_clear()
    yield
    member_kinds.cache_clear()


def test_files_are_read_by_their_ending(declared: None, tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), (9, 9, 9)).save(tmp_path / "a.PPM", "PPM")
    source = source_of(tmp_path / "a.PPM")
    assert isinstance(source, Halves)
    assert loaded(source, lambda picture: torch.tensor(picture.size)).tolist() == [[4, 4], [4, 4]]
    assert augmented(source, RandomCrop(2), random.Random(0)).unique().tolist() == [9]
    assert source_of(tmp_path / "b.jpg") == ImageFile(tmp_path / "b.jpg") == Record(0, tmp_path / "b.jpg").image
    assert reader_of(".ppm").leading == (2,)
    assert reader_of(".ppm", {"halves": 3}).leading == (3,)
    assert reader_of(".ppm", {"halves": 3}) is reader_of(".PPM", {"halves": 3})


def test_readers_are_equal_in_every_process(declared: None) -> None:
    """Captions of several processes are gathered by their sources, which hold a reader."""
    for reader in (IMAGES, reader_of(".ppm", {"halves": 3})):
        copy = pickle.loads(pickle.dumps(reader))
        assert copy == reader
        assert {reader: 1}[copy] == 1
    assert len({IMAGES, reader_of(".ppm", {"halves": 2}), reader_of(".ppm", {"halves": 3})}) == 3


def test_an_option_chooses_the_reader(declared: None) -> None:
    assert chosen_reader({}) is chosen_reader({"halves": 0}) is IMAGES
    assert chosen_reader({"halves": 4}).leading == (4,)
    assert readable_endings({"halves": 0}) == readable_endings({}) == IMAGES.endings
    assert readable_endings({"halves": 1}) == (*IMAGES.endings, ".ppm")


def test_members_of_shards_have_the_limit_of_their_kind(declared: None) -> None:
    assert member_kinds()[3:] == (("ppm",), ("mine",))
    sizes = [read_limit(name) for name in ("a/b.JPG", "b.txt", "b.json", "b.ppm", "b.mine", "b.exe", "jpg", "txt")]
    assert sizes == [32 * 2**20 + 1, 2**20 + 1, 2**20 + 1, *[sizes[3]] * 2, 0, 0, 0]
    assert sizes[3] > sizes[0]

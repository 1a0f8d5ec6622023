"""The built-in scenes: splits, captions, pixels, and the data-set files written from them."""

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from coca_lit.data.scenes.render import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    WORDINGS,
    Scene,
    Thing,
    captions,
    decode,
    render,
    scene_records,
    space_size,
)
from coca_lit.models.presets import VOCABULARIES
from coca_lit.tools.prepare import scenes as writing
from coca_lit.tools.prepare.scenes import export_scenes, write_shards
from helpers.scene_files import write_data_set

SPLITS = {"train": 12_000, "val": 512, "test": 512, "compositional": 512}
NAME = re.compile(rf"a (small|large) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")


@pytest.fixture(scope="module")
def splits():
    return {split: scene_records(split) for split in SPLITS}


def pairs(records):
    """Colour-shape pairs as told by the captions."""
    return [{match[1:] for match in NAME.findall(record.captions[0])} for record in records]


def test_splits_have_their_counts_and_share_no_scene(splits):
    assert {split: len(records) for split, records in splits.items()} == SPLITS
    assert len({record.id for records in splits.values() for record in records}) == sum(SPLITS.values())


def test_held_out_pairs_occur_in_the_compositional_split_only(splits):
    for split in ("train", "val", "test"):
        assert not set.union(*pairs(splits[split])) & HELD_OUT
    assert all(found & HELD_OUT for found in pairs(splits["compositional"]))
    seen = set.union(*pairs(splits["train"]))
    assert len(seen) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)
    assert {colour for colour, _ in seen} == set(COLOURS)
    assert {shape for _, shape in seen} == set(SHAPES)


def test_a_count_takes_a_prefix_and_has_a_limit(splits):
    assert [record.id for record in scene_records("train", count=100)] == [
        record.id for record in splits["train"][:100]
    ]
    assert len(scene_records("train", count=13_088)) == 13_088
    with pytest.raises(ValueError, match=r"13088 .*count=13089"):
        scene_records("train", count=13_089)
    with pytest.raises(ValueError, match=r"'dev'.*train, val, test, compositional"):
        scene_records("dev")
    with pytest.raises(ValueError, match=r"'loud'.*standard, narrated"):
        scene_records("val", style="loud")
    with pytest.raises(ValueError, match="2 or 3 objects"):
        scene_records("val", objects=4)


def test_captions_tell_a_row_and_a_column():
    things = (Thing("small", "red", "circle"), Thing("large", "blue", "square"))
    assert captions(Scene("row", things)) == (
        "a small red circle to the left of a large blue square",
        "a large blue square to the right of a small red circle",
        "there is a small red circle and then a large blue square to the right of it",
        "from left to right a small red circle then a large blue square",
        "the picture shows a small red circle followed on the right by a large blue square",
    )
    assert captions(Scene("column", things))[1] == "a large blue square below a small red circle"
    assert len(set(captions(Scene("row", things), WORDINGS))) == 10


def test_the_other_style_tells_the_same_scenes_in_other_words():
    standard, narrated = (scene_records("val", count=20, style=style) for style in ("standard", "narrated"))
    assert [record.id for record in narrated] == [record.id for record in standard]
    for one, other in zip(standard, narrated, strict=True):
        assert len(other.captions) == 5
        assert not set(one.captions) & set(other.captions)
        assert one.captions + other.captions == captions(decode(one.id), WORDINGS)


@pytest.mark.parametrize("objects", [2, 3])
def test_every_caption_belongs_to_one_scene_and_names_all_objects(objects):
    records = [record for split in SPLITS for record in scene_records(split, objects=objects)]
    texts = [text for record in records for text in record.captions]
    assert len(set(texts)) == len(texts) == 5 * len(records)
    for record in records[::50]:
        scene = decode(record.id, objects)
        for text in captions(scene, WORDINGS):
            assert sorted(NAME.findall(text)) == sorted(scene.things)


def test_vocabulary_is_exactly_the_words_of_the_captions():
    numbers = range(0, space_size(2), 3)
    words = {word for number in numbers for text in captions(decode(number), WORDINGS) for word in text.split(" ")}
    vocabulary = VOCABULARIES["scenes"]
    assert words == set(vocabulary)
    assert vocabulary == sorted(vocabulary)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in vocabulary)


def test_order_of_the_scenes_is_pinned():
    """Results are comparable between machines and versions only as long as these numbers stay."""
    assert [record.id for record in scene_records("train", count=5)] == [4490, 1843, 1699, 4456, 17366]
    assert [record.id for record in scene_records("val", count=5)] == [16413, 10464, 15103, 3273, 10838]
    assert [record.id for record in scene_records("compositional", count=5)] == [3951, 4331, 6774, 12399, 12857]
    assert [record.id for record in scene_records("val", count=5, objects=3)] == [
        252917,
        1050445,
        277214,
        433558,
        1411710,
    ]


def number_of(axis: str, *things: tuple[str, str, str]) -> int:
    wanted = Scene(axis, tuple(Thing(*thing) for thing in things))
    return next(number for number in range(space_size(2)) if decode(number) == wanted)


def centre(image: Image.Image, colour: str) -> np.ndarray:
    """Mean (x, y) of the pixels that have exactly this colour, as a fraction of the image."""
    rows, columns = np.nonzero((np.asarray(image) == COLOURS[colour]).all(axis=-1))
    return np.array([columns.mean(), rows.mean()]) / image.width


@pytest.mark.parametrize("size", [32, 64, 224])
def test_objects_stand_where_the_captions_say(size):
    red, blue = ("large", "red", "square"), ("small", "blue", "circle")
    row, column = render(number_of("row", red, blue), size), render(number_of("column", red, blue), size)
    assert row.size == (size, size)
    assert row.mode == "RGB"
    x_first, _ = centre(row, "red")
    x_second, _ = centre(row, "blue")
    assert 0.15 < x_first < 0.35
    assert 0.65 < x_second < 0.85
    assert centre(column, "red")[1] < 0.35 < 0.65 < centre(column, "blue")[1]


def load(path: Path):
    return json.loads(path.read_text())


def similar(content: bytes, image: Image.Image) -> bool:
    """A JPEG with full colour resolution whose pixels are close to the rendered ones."""
    decoded = Image.open(io.BytesIO(content))
    difference = np.asarray(decoded, dtype=float) - np.asarray(image, dtype=float)
    return JpegImagePlugin.get_sampling(decoded) == 0 and np.abs(difference).mean() < 6


def test_shards_are_those_of_img2dataset(tmp_path):
    write_shards(tmp_path, count=10, size=32, per_shard=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{shard:05d}{suffix}" for shard in range(3) for suffix in (".tar", "_stats.json")
    ]
    assert load(tmp_path / "00002_stats.json")["successes"] == 2
    with tarfile.open(tmp_path / "00002.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(members) == [f"00002{row}.{suffix}" for row in range(2) for suffix in ("jpg", "json", "txt")]
    record, meta = scene_records("train")[9], json.loads(members["000021.json"])
    assert similar(members["000021.jpg"], record.image())
    assert members["000021.txt"].decode() == meta["caption"] == record.captions[1]
    assert (meta["key"], meta["status"], meta["error_message"]) == ("000021", "success", None)
    assert meta["width"] == meta["original_height"] == 32
    assert meta["sha256"] == hashlib.sha256(members["000021.jpg"]).hexdigest()


def test_karpathy_coco_has_every_split_and_its_images(tmp_path):
    write_data_set("karpathy", tmp_path, count=16, size=32)
    content = load(tmp_path / "dataset_coco.json")
    splits = [image["split"] for image in content["images"]]
    assert {split: splits.count(split) for split in splits} == {"train": 12, "restval": 4, "val": 2, "test": 2}
    assert content["dataset"] == "coco"
    for image in content["images"]:
        assert image["filepath"] == ("train2014" if image["split"] == "train" else "val2014")
        assert image["filename"] == f"COCO_{image['filepath']}_{image['cocoid']:012d}.jpg"
        path = tmp_path / "images" / image["filepath"] / image["filename"]
        assert similar(path.read_bytes(), render(image["cocoid"]))
        assert [sentence["raw"] for sentence in image["sentences"]] == list(captions(decode(image["cocoid"])))
        assert [sentence["sentid"] for sentence in image["sentences"]] == image["sentids"]
    sentids = [sentid for image in content["images"] for sentid in image["sentids"]]
    assert sentids == list(range(5 * 20))


def test_nocaps_has_three_domains_and_ten_different_captions(tmp_path):
    write_data_set("nocaps", tmp_path, count=8, size=32)
    content = load(tmp_path / "nocaps_val_4500_captions.json")
    domains = [image["domain"] for image in content["images"]]
    assert domains == 3 * ["in-domain"] + 3 * ["near-domain"] + 2 * ["out-domain"]
    for image in content["images"]:
        texts = [note["caption"] for note in content["annotations"] if note["image_id"] == image["id"]]
        assert len(set(texts)) == 10
        found = NAME.findall(texts[0])
        assert len(found) == (3 if image["domain"] == "out-domain" else 2)
        assert any(match[1:] in HELD_OUT for match in found) == (image["domain"] == "near-domain")
        assert image["file_name"] == f"{image['open_images_id']}.jpg"
        assert (tmp_path / "images" / image["file_name"]).is_file()


def test_a_folder_with_content_is_refused_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    mine = tmp_path / "mine" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("keep")
    with pytest.raises(FileExistsError, match="mine"):
        export_scenes("shards", mine.parent, count=8)

    def broken(folder: Path, count: int, size: int) -> None:
        (folder / "half").write_text("written")
        raise OSError("disk full")

    monkeypatch.setattr(writing, "write_shards", broken)
    with pytest.raises(OSError, match="disk full"):
        export_scenes("shards", tmp_path / "new", count=8)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]
    with pytest.raises(ValueError, match="'csv'"):
        export_scenes("csv", tmp_path / "new")

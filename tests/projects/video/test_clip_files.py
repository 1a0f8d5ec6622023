"""Clips in the files of MSR-VTT, of a folder of one's own, and of Kinetics."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coca_lit.data.datasets.classification import image_folder
from coca_lit.data.records import ImageFile
from coca_lit.data.scenes.render import render
from coca_lit.errors import DataError
from coca_lit.projects.classification.classes import class_labels, class_records
from coca_lit.projects.video.clips import ClipFile
from coca_lit.projects.video.datasets import clip_records, msrvtt_records

# Of each clip: split and captions. video4 is in no table of 1k-A.
VIDEOS = {
    "video0": ("train", ["a man sings", "a man is singing"]),
    "video1": ("train", ["a cat"]),
    "video2": ("validate", ["two dogs run"]),
    "video3": ("test", ["a car", "the red car"]),
    "video4": ("test", ["a boat"]),
}


def content(keys: list[str]) -> dict[str, Any]:
    return {
        "videos": [{"video_id": key, "split": VIDEOS[key][0], "category": 3, "url": "x"} for key in keys],
        "sentences": [{"video_id": key, "caption": text, "sen_id": 0} for key in keys for text in VIDEOS[key][1]],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Records are made without looking into the clips."""
    (tmp_path / "videos").mkdir()
    for key in VIDEOS:
        (tmp_path / "videos" / f"{key}.mp4").write_bytes(b"")
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(content([*VIDEOS])))
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text("key,vid_key,video_id,sentence\nret0,msr3,video3,a car drives\n")
    (tmp_path / "MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo1\nvideo2\n")
    return tmp_path


def found(root: Path, split: str, **more: Any) -> dict[int | str, tuple[str, ...]]:
    records = msrvtt_records(root, split, frames=5, **more)
    for record in records:
        assert record.image == ClipFile(root / "videos" / f"{record.id}.mp4", 5)
    return {record.id: record.captions for record in records}


def test_msrvtt(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split, name in (("train", "train"), ("val", "validate"), ("test", "test")):
        assert found(root, split) == {key: tuple(texts) for key, (its, texts) in VIDEOS.items() if its == name}
    assert found(root, "test", one_thousand=True) == {"video3": ("a car drives",)}
    assert found(root, "train", one_thousand=True).keys() == {"video0", "video1", "video2"}
    assert not caplog.messages
    assert found(root, "val", one_thousand=True).keys() == {"video2"}
    assert "are among the training clips of 1k-A" in caplog.text
    with pytest.raises(DataError, match=r"train, val, test.*'dev'"):
        found(root, "dev")


def test_the_two_files_of_the_challenge(root: Path) -> None:
    expected = [found(root, split) for split in ("train", "val", "test")]
    (root / "MSRVTT_data.json").unlink()
    (root / "train_val_videodatainfo.json").write_text(json.dumps(content(["video0", "video1", "video2"])))
    (root / "test_videodatainfo.json").write_text(json.dumps(content(["video3", "video4"])))
    assert [found(root, split) for split in ("train", "val", "test")] == expected
    (root / "test_videodatainfo.json").unlink()
    (root / "MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo4\n")
    with pytest.raises(DataError, match=r"lacks 1 clips .*video4"):
        found(root, "train", one_thousand=True)


def test_what_is_missing_or_malformed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "MSRVTT_JSFUSION_test.csv").unlink()
    with pytest.raises(DataError, match="1k-A"):
        found(root, "test", one_thousand=True)
    for broken in ({}, {"videos": [{}], "sentences": []}, {"videos": 3, "sentences": []}, []):
        (root / "MSRVTT_data.json").write_text(json.dumps(broken))
        with pytest.raises(DataError, match="MSRVTT_data"):
            found(root, "train")
    stray = content(["video0"])
    stray["sentences"].append({"video_id": "video9", "caption": "x"})
    (root / "MSRVTT_data.json").write_text(json.dumps(stray))
    with pytest.raises(DataError, match="'video9'"):
        found(root, "train")
    inside = content(["video0"])
    inside["videos"][0]["video_id"] = inside["sentences"][0]["video_id"] = "../../etc/passwd"
    inside["sentences"] = inside["sentences"][:1]
    (root / "MSRVTT_data.json").write_text(json.dumps(inside))
    with caplog.at_level(logging.ERROR), pytest.raises(DataError, match="not found"):
        found(root, "train")


def test_own_clips_and_images(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.MOV"):
        (tmp_path / name).write_bytes(b"")
    render(0, size=48).save(tmp_path / "c.png")  # what is scored can be decoded
    rows = ["file,caption,split", "a.mp4,a dog,train", "b.MOV,a cat,train", "c.png,a cow,val", "a.mp4,the dog,train"]
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    first, second = clip_records(tmp_path, "train", frames=7)
    assert first.captions == ("a dog", "the dog")
    assert (first.image, second.image) == (ClipFile(tmp_path / "a.mp4", 7), ClipFile(tmp_path / "b.MOV", 7))
    (image,) = clip_records(tmp_path, "val", frames=7)
    assert image.image == ImageFile(tmp_path / "c.png")


def test_own_clips_without_a_split(tmp_path: Path) -> None:
    """A tenth is held out by what the clips show; a copy in another container stays with the first."""
    pytest.importorskip("av")
    from helpers.clips import write_clip

    noise = np.random.default_rng(0)
    for i in range(20):
        coarse = noise.integers(0, 256, (8, 8, 3), np.uint8)
        frames = [np.kron(coarse, np.ones((8, 8, 1), np.uint8))] * 4
        for name in (f"{i}.mp4", f"{i}.mkv"):
            write_clip(tmp_path / name, frames)
            (tmp_path / name).with_suffix(".txt").write_text("a dog\na black dog")
    (tmp_path / "photo.jpg").write_bytes(b"")  # without a caption
    splits = {split: {str(record.id) for record in clip_records(tmp_path, split, 3)} for split in ("train", "val")}
    assert [len(splits[split]) for split in ("train", "val")] == [36, 4]
    assert all(len({name.partition(".")[0] for name in names}) == len(names) / 2 for names in splits.values())
    assert clip_records(tmp_path, "val", 3)[0].captions == ("a dog", "a black dog")


def test_folders_of_classes(tmp_path: Path) -> None:
    for name in ("riding_a_bike", "singing"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "train" / name / f"{i}.mp4").write_bytes(b"")
        (tmp_path / "train" / name / "cover.jpg").write_bytes(b"")
    clips = image_folder(tmp_path / "train", frames=16)
    assert clips.class_names == ("riding a bike", "singing")
    assert clips.templates == ("a video of {}.",)
    assert {str(record.id) for record in clips.records} == {
        f"{n}/{i}.mp4" for n in ("riding_a_bike", "singing") for i in range(3)
    }
    assert all(record.image == ClipFile(tmp_path / "train" / str(record.id), 16) for record in clips.records)
    records = class_records(tmp_path, "train", frames=16)
    assert {r.captions for r in records} == {("riding a bike",), ("singing",)}
    assert class_labels(tmp_path) == ["riding a bike", "singing"]
    assert len(image_folder(tmp_path / "train").records) == 2  # images alone

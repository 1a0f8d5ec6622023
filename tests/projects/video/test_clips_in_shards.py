"""Clips as members of shards: trained on, evaluated and checked, with the bounds of files."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("av")

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.scan import read_shard
from coca_lit.data.shards.shard import Shard
from coca_lit.errors import DataError
from coca_lit.projects.video.clips import Clip, ClipFile, ClipReader
from coca_lit.projects.video.shards import clip_shard_records
from coca_lit.tools.prepare.check import check_shard
from helpers.clips import greys, write_clip
from helpers.shards import TOKENIZER, jpeg, write_tar

GOOD = ("a.mp4", "b.webm", "c.mkv", "d.MP4")
SHADES = {"a": 0, "b": 50, "c": 100, "d": 150}  # each clip goes from its shade to one 70 above it


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    found = {}
    for name in GOOD:
        shades = range(SHADES[name[0]], SHADES[name[0]] + 80, 10)
        path = folder / name.lower()
        found[name] = write_clip(path, greys(shades), "libvpx-vp9" if name.endswith("webm") else "libx264")
    found["sound.mp4"] = write_clip(folder / "sound.mp4", [])
    return found


def shard(clips: dict[str, Path], folder: Path, *names: str) -> Path:
    files = {}
    for name in names:
        key = name.partition(".")[0]
        files |= {name: clips[name].read_bytes(), f"{key}.txt": b"a dog"}
    return write_tar(folder / "00000.tar", files)


def data(folder: Path, **more) -> LAIONDataModule:
    made = LAIONDataModule(
        str(folder), None, tokenizer=TOKENIZER, batch_size=4, image_size=16, cache_dir=str(folder / "cache"), **more
    )
    made.trainer = SimpleNamespace(global_rank=0, world_size=1)
    return made


def test_training_sees_the_frames(clips: dict[str, Path], tmp_path: Path) -> None:
    shard(clips, tmp_path, *GOOD)
    (batch,) = data(tmp_path, frames=2).train_dataloader().batches_from(0, 0)
    assert batch.images.rows.shape == (4, 2, 3, 16, 16)
    means = batch.images.rows.float().mean(dim=(2, 3, 4)).tolist()
    found = {key[-1]: shades for key, shades in zip(batch.keys, means, strict=True)}
    expected = {key: [shade + 20, shade + 60] for key, shade in SHADES.items()}  # the third of eight, and the seventh
    assert found.keys() == expected.keys()
    for key, shades in expected.items():
        np.testing.assert_allclose(found[key], shades, atol=4)


def test_a_clip_goes_before_an_image_if_frames_are_wanted(clips: dict[str, Path], tmp_path: Path) -> None:
    files = {f"{key}.{end}": content for key in "efgh" for end, content in (("jpg", jpeg()), ("txt", b"a dog"))}
    files |= {f"{key}.mp4": clips["a.mp4"].read_bytes() for key in "efgh"}
    write_tar(tmp_path / "00000.tar", dict(sorted(files.items())))
    for frames, shape in ((0, (4, 3, 16, 16)), (3, (4, 3, 3, 16, 16))):
        (batch,) = data(tmp_path, frames=frames).train_dataloader().batches_from(0, 0)
        pixels = batch.images.rows if frames else batch.images
        assert pixels.shape == shape


def test_damaged_clips_and_sound_count_as_bad(clips: dict[str, Path], tmp_path: Path) -> None:
    """Each with one sentence, and other clips take their places."""
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(clips["a.mp4"].read_bytes()[:-400])
    path = shard(clips | {"torn.mp4": torn}, tmp_path, *GOOD, "sound.mp4", "torn.mp4")
    loaded = data(tmp_path, frames=2, max_bad_fraction=0.9)
    batches = list(loaded.train_dataloader().batches_from(0, 0))
    batches += loaded.train_dataloader().batches_from(1, 0)
    bad = {found.key: found for batch in batches for found in batch.bad}
    assert {len(batch.images) for batch in batches} == {4}
    assert bad.keys() in ({"sound"}, {"torn"}, {"sound", "torn"})
    assert {found.reason for found in bad.values()} == {"unreadable clip"}
    assert all(f"{key} in {path} is not a readable clip" in found.detail for key, found in bad.items())
    report = check_shard(path)
    assert (report.entry.samples, sum(report.bad.values())) == (4, 2)


def test_shards_of_clips_ask_for_frames(clips: dict[str, Path], tmp_path: Path) -> None:
    shard(clips, tmp_path, *GOOD)
    with pytest.raises(DataError, match=r"set data\.frames"):
        data(tmp_path).prepare_data()


def test_records_for_evaluation(clips: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(clips, tmp_path, *GOOD)
    records = clip_shard_records(str(path), frames=3)
    assert [record.id for record in records] == [f"00000.tar/{key}" for key in SHADES]
    for record, name in zip(records, GOOD, strict=True):
        assert isinstance(record.image, Clip)
        assert record.captions == ("a dog",)
        of_file = ClipFile(clips[name], 3)
        np.testing.assert_array_equal([*record.image.frames()], [*of_file.frames()])
        np.testing.assert_array_equal(record.image(), of_file())
    read = [*read_shard(Shard(str(path)), ["txt"], BadSamples(0), [ClipReader(3)])]
    assert [[*map(np.array, record.image.frames())][2].tolist() for record in read] == [
        [*map(np.array, record.image.frames())][2].tolist() for record in records
    ]
    path.write_bytes(path.read_bytes() + bytes(1024))
    with pytest.raises(DataError, match=r"a in .*changed after it was indexed"):
        records[0].image()


def test_what_is_no_clip_is_counted(clips: dict[str, Path], tmp_path: Path) -> None:
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(clips["a.mp4"].read_bytes()[:-400])
    path = shard(clips | {"torn.mp4": torn}, tmp_path, *GOOD, "sound.mp4", "torn.mp4")
    with pytest.raises(DataError, match=r"2 of 6 samples \(2 x unreadable clip"):
        clip_shard_records(str(path), frames=3)
    records = clip_shard_records(str(path), frames=3, max_bad_fraction=0.5)
    assert [record.id for record in records] == [f"00000.tar/{key}" for key in SHADES]
    path = shard(clips | {"e.jpg": clips["a.mp4"]}, tmp_path, *GOOD, "e.jpg")
    with pytest.raises(DataError, match=r"1 of 5 samples \(1 x missing clip"):
        clip_shard_records(str(path), frames=3)


def test_a_missing_package_is_no_fault_of_a_clip(
    clips: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'coca_lit\[video\]'"):
        clip_shard_records(str(shard(clips, tmp_path, *GOOD)), frames=3, max_bad_fraction=1.0)


def test_one_faulty_shard_of_many_does_not_end_an_evaluation(clips: dict[str, Path], tmp_path: Path) -> None:
    clip = clips["a.mp4"].read_bytes()
    good = {f"{key}.{end}": content for key in "ab" for end, content in (("mp4", clip), ("txt", b"a dog"))}
    for i in range(25):
        write_tar(tmp_path / f"{i:05d}.tar", good | ({"b.MP4": b"twice"} if i == 7 else {}))
    torn = tmp_path / "00009.tar"
    # within the clip of its second sample: a header for each file, and the files in blocks of 512 bytes
    torn.write_bytes(torn.read_bytes()[: 4 * 512 + len(clip) // 512 * 512 + 512])
    records = clip_shard_records(str(tmp_path), frames=3)
    wanted = {f"{i:05d}.tar/{key}" for i in range(25) for key in "ab"} - {"00007.tar/b", "00009.tar/b"}
    assert {record.id for record in records} == wanted


def test_clips_of_two_folders_have_ids_of_their_own(clips: dict[str, Path], tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shard(clips, tmp_path / folder, "a.mp4")
    records = clip_shard_records(str(tmp_path / "{one,two}"), frames=3)
    assert [record.id for record in records] == [f"{tmp_path}/{folder}/00000.tar/a" for folder in ("one", "two")]

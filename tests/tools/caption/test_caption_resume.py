"""`coca-caption` killed at every point where it writes, and gone on with: nothing is lost, repeated or different."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from coca_lit.errors import ConfigError, DataError
from coca_lit.files import append_lines
from coca_lit.tools.caption import inputs, outputs
from helpers.applying import caption, fill


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, photos/ with one that is broken, shards/, and of each kind of output the one without a kill."""
    folder = fill(tmp_path_factory.mktemp("resume"), photos=10, samples=12, per_shard=4)  # photos in batches of 3
    for output in ("lines.jsonl", "coco.json", "new/"):
        write(folder, folder / "expected" / output)
    return folder


def write(folder: Path, output: Path) -> None:
    images = folder / ("photos" if output.suffix else "shards")
    caption(f"checkpoint={folder}/tiny.safetensors", f"images=[{images}]", f"output={output}", "batch_size=3")


def killed(work: Callable[[], None]) -> bool:
    """Runs `work` in a copy of this process; whether it was killed by SIGKILL on its way."""
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def dying(function: Callable[..., Any], at: int, before: Callable[..., Any] = lambda *_: None) -> Callable[..., Any]:
    """`function`, but its call number `at` does `before` and kills the process instead."""
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            before(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return call


def contents(path: Path) -> dict[str, bytes]:
    """Of an output: its files, those beside it that belong to it included, temporary ones not."""
    files = path.iterdir() if path.is_dir() else path.parent.glob(f"{path.name}*")
    return {file.name: file.read_bytes() for file in files if not file.name.startswith(".")}


def half_a_line(path: Path, rows: Any) -> None:
    """What a kill in the middle of a write leaves: the first row and a torn second one."""
    rows = list(rows)
    append_lines(path, rows[:1])
    with path.open("a") as file:
        file.write('{"path": "photos/x.png", "capt')


@pytest.mark.slow
@pytest.mark.parametrize("output", ["lines.jsonl", "coco.json"])
def test_lines(output: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kills = tmp_path / output, 0
    for at in (1, 2, 1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(outputs, "append_lines", dying(append_lines, at, half_a_line))
            kills += killed(lambda: write(folder, path))
    with monkeypatch.context() as patch:  # and while everything is brought in order
        patch.setattr(outputs, "atomic_write", dying(outputs.atomic_write, 1))
        kills += killed(lambda: write(folder, path))
    assert kills >= 3
    write(folder, path)
    assert contents(path) == contents(folder / "expected" / output)


def test_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kills = tmp_path / "new", 0
    for at in (2, 5, 6):  # within a shard, and within a later one
        with monkeypatch.context() as patch:
            patch.setattr(inputs, "_recaptioned", dying(inputs._recaptioned, at))
            kills += killed(lambda: write(folder, path))
    assert kills == 3
    done = {file.name: file.stat().st_mtime_ns for file in path.glob("*.tar")}
    assert 0 < len(done) < 3
    for left in path.glob(".*-tmp"):
        os.utime(left, (0, 0))  # long ago: nobody is at work on it
    write(folder, path)
    assert contents(path) == contents(folder / "expected" / "new")
    assert done.items() <= {file.name: file.stat().st_mtime_ns for file in path.glob("*.tar")}.items()
    assert not list(path.glob(".*-tmp"))  # what the killed ones left half-written


def test_what_was_added_is_captioned(folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    os.link(folder / "photos" / "7.png", photos / "7.png")
    words = (f"checkpoint={folder}/tiny.safetensors", f"images=[{photos}]", f"output={tmp_path}/c.jsonl")
    caption(*words)
    (first,) = (tmp_path / "c.jsonl").read_text().splitlines()
    os.link(folder / "photos" / "3.png", photos / "3.png")
    caption(*words)
    assert [line.split('"')[3] for line in (tmp_path / "c.jsonl").read_text().splitlines()] == [
        str(photos / "3.png"),
        str(photos / "7.png"),
    ]
    assert (tmp_path / "c.jsonl").read_text().splitlines()[1] == first


@pytest.mark.parametrize("output", ["c.jsonl", "c.json"])
def test_another_photo_of_the_same_name_is_captioned(output: str, folder: Path, tmp_path: Path) -> None:
    photo, path = tmp_path / "0.png", tmp_path / output
    rows = []
    for of in (7, 3):
        photo.unlink(missing_ok=True)
        Image.new("RGB", (32, 32), (of, 9 * of, 30 * of)).save(photo)
        caption(f"checkpoint={folder}/tiny.safetensors", f"images=[{photo}]", f"output={path}")
        rows.append(path.read_text())
        state = photo.stat()
        assert str(state.st_mtime_ns) in rows[-1]
        assert rows[-1].count("caption") == 1
    assert rows[0] != rows[1]


@pytest.mark.parametrize("output", ["c.jsonl", "c.json"])
def test_what_a_killed_process_left_does_not_replace_a_new_caption(output: str, folder: Path, tmp_path: Path) -> None:
    photo, path = tmp_path / "0.png", tmp_path / output
    Image.new("RGB", (32, 32), "red").save(photo)
    caption(f"checkpoint={folder}/tiny.safetensors", f"images=[{photo}]", f"output={path}")
    key = {"path": str(photo)} if output == "c.jsonl" else {"image_id": 0}
    append_lines(tmp_path / f"{output}.rank1", [json.dumps(key | {"caption": "of an older photo", "file": [1, 1]})])
    caption(f"checkpoint={folder}/tiny.safetensors", f"images=[{photo}]", f"output={path}")
    assert "older" not in path.read_text()
    assert not (tmp_path / f"{output}.rank1").exists()


@pytest.mark.parametrize("output", ["c.jsonl", "c.json"])
def test_what_a_process_left_is_of_the_model_that_its_settings_name(output: str, folder: Path, tmp_path: Path) -> None:
    append_lines(tmp_path / f"{output}.rank1", [json.dumps({"path": "0.png", "image_id": 0, "caption": "of another"})])
    words = (f"checkpoint={folder}/tiny.safetensors", f"images=[{folder}/photos/0.png]", f"output={tmp_path}/{output}")
    with pytest.raises(DataError, match=rf"{output}\.settings\.json is missing"):
        caption(*words)


def test_another_shard_of_the_same_name_is_captioned(folder: Path, tmp_path: Path) -> None:
    first, *_, last = sorted((folder / "shards").glob("*.tar"))
    shard, path = tmp_path / first.name, tmp_path / "new" / first.name
    for source, day in ((first, 1), (last, 2)):
        shutil.copy(source, shard)
        os.utime(shard, (86400 * day, 86400 * day))
        caption(f"checkpoint={folder}/tiny.safetensors", f"images=[{shard}]", f"output={tmp_path}/new/", "batch_size=3")
        assert path.read_bytes() == (folder / "expected" / "new" / source.name).read_bytes()


@pytest.mark.parametrize(("output", "kind"), [("c.json", "photos/*.png"), ("new/", "shards/*.tar")])
def test_another_folder_with_the_same_names_replaces_nothing(
    output: str, kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, *_ = sorted(folder.glob(kind))
    places = [tmp_path / name / one.name for name in ("a", "b")]
    for source, place in zip((one, other), places, strict=True):
        place.parent.mkdir()
        shutil.copy(source, place)
    words = (f"checkpoint={folder}/tiny.safetensors", f"output={tmp_path}/{output}")
    monkeypatch.chdir(places[0].parent)
    caption(*words, f"images=[{places[0].name}]")
    before = contents(tmp_path / output)
    monkeypatch.chdir(places[1].parent)  # by a name that also the first one had
    for name in (places[1], places[1].name):
        with pytest.raises(DataError, match=re.escape(str(places[0]))):
            caption(*words, f"images=[{name}]")
    assert contents(tmp_path / output) == before
    places[0].rename(places[0].with_name("moved"))  # whose captions these are is unknown then
    caption(*words, f"images=[{places[1]}]")
    assert contents(tmp_path / output) != before


@pytest.mark.slow
@pytest.mark.parametrize("output", ["lines.jsonl", "coco.json"])
def test_two_commands_on_one_file(output: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def append(path: Path, rows: Any) -> None:  # the first command is at work
        with pytest.raises(ConfigError, match=rf"{output}.* {os.getpid()}"):
            write(folder, tmp_path / output)
        append_lines(path, rows)

    monkeypatch.setattr(outputs, "append_lines", append)
    write(folder, tmp_path / output)
    assert contents(tmp_path / output) == contents(folder / "expected" / output)
    assert not list(tmp_path.glob(".*"))


def test_two_commands_on_one_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = inputs._recaptioned

    def second(*arguments: Any) -> Any:  # begins and ends while the first command writes a shard
        monkeypatch.setattr(inputs, "_recaptioned", real)
        write(folder, tmp_path / "new")
        return real(*arguments)

    monkeypatch.setattr(inputs, "_recaptioned", second)
    write(folder, tmp_path / "new")
    assert contents(tmp_path / "new") == contents(folder / "expected" / "new")
    assert not list((tmp_path / "new").glob(".*-tmp"))

"""`coca-caption` on 1, 2 and 3 processes: the same captions, the same bytes."""

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.applying import caption, fill


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("ranks"), photos=7, samples=8, per_shard=2)


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What one process prints; its files are in one/."""
    return write(folder, "one")[0]


def write(folder: Path, into: str) -> tuple[str, str]:
    """Every kind of output in a folder; returns what this process printed, as captions and as reports."""
    same = (f"checkpoint={folder}/tiny.safetensors", "batch_size=2", "generate.strategy=sample")
    photos, shards = f"images=[{folder}/photos]", f"images=[{folder}/shards]"
    out, reports = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(reports):
        caption(*same, photos)
        caption(*same, photos, f"output={folder}/{into}/c.json")
        caption(*same, f"images=[{folder}/shards/00001.tar,{folder}/photos]", f"output={folder}/{into}/c.jsonl")
        caption(*same, shards, f"output={folder}/{into}/new/")
    return out.getvalue(), reports.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_results_of_several_processes(folder: Path, printed: str, on_ranks: Callable) -> None:
    results = on_ranks(3, write, folder, "three")
    assert [out for out, _ in results] == [printed, "", ""]
    assert files(folder / "three") == files(folder / "one")
    assert sum(reports.count("4.png is not a readable image") for _, reports in results) == 3
    assert "6 images in " in results[0][1]  # over all processes


@pytest.mark.usefixtures("printed")
@pytest.mark.slow
def test_other_processes_go_on_with_what_was_left(folder: Path, on_ranks: Callable) -> None:
    shutil.copytree(folder / "one", folder / "left")
    lines = (folder / "left" / "c.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "left" / "c.jsonl").write_bytes(b"".join(lines[:2]) + b'{"pa')
    (folder / "left" / "c.jsonl.rank2").write_bytes(lines[5] + lines[7] + b'{"path": "torn')
    (folder / "left" / "new" / "00002.tar").unlink()
    on_ranks(2, write, folder, "left")
    assert files(folder / "left") == files(folder / "one")

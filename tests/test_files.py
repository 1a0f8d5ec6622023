"""Files on disks that are full, and on systems that lack symbolic links."""

import errno
import io
import logging
import os
import re
import signal
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from coca_lit.errors import DataError
from coca_lit.files import (
    TEMPORARY,
    Waiting,
    append_lines,
    atomic_link,
    durable_rename,
    remove_leftovers,
    replacing,
    spreadsheet_text,
    temporary_folder,
    write_waiting,
)
from coca_lit.tools.claims import claim
from helpers.disks import at_most
from helpers.forking import called

UNFINISHED = f".1-{'0' * 8}-{'0' * 8}{TEMPORARY}"  # what ends the name of a file that another machine left


def test_lines_are_appended_all_or_none(tmp_path: Path) -> None:
    called(append_two, tmp_path / "rows.csv")


def append_two(path: Path) -> None:
    append_lines(path, ["first"])
    at_most(12)  # of which the second line fits, and half of the third
    with pytest.raises(DataError, match=r"^cannot write .*rows\.csv: File too large$"):
        append_lines(path, ["next", "more"])
    at_most(None)
    assert path.read_text() == "first\n"
    append_lines(path, ["next", "more"])
    assert path.read_text() == "first\nnext\nmore\n"


def test_safetensors_on_a_full_disk_are_one_sentence(tmp_path: Path) -> None:
    called(write_tensors, tmp_path / "index.safetensors")


def write_tensors(path: Path) -> None:
    at_most(100)
    with pytest.raises(DataError, match=r"cannot write .*index\.safetensors.* File too large"), replacing(path) as file:
        save_file({"x": np.zeros(100)}, file)
    assert list(path.parent.iterdir()) == []


def test_rows_wait_for_the_disk(tmp_path: Path) -> None:
    called(write_rows, tmp_path / "rows.csv")


def write_rows(path: Path) -> None:
    logging.getLogger().addHandler(logging.StreamHandler(log := io.StringIO()))
    waiting: Waiting[str] = Waiting(path, lambda rows: append_lines(path, rows))
    waiting.add("0")
    at_most(2)
    for row in "1234":
        waiting.add(row)
    assert log.getvalue().count("wait in memory") == 1
    with pytest.raises(DataError, match=r"rows\.csv, for which 4 rows wait"):
        write_waiting()
    at_most(None)
    waiting.add("5")
    assert path.read_text().split() == list("012345")
    assert "can be written again: 5 rows were added" in log.getvalue()
    write_waiting()
    at_most(2)
    waiting.add("6")
    waiting.flush(last=True)
    assert "1 rows are lost" in log.getvalue()


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(1, "Operation not permitted")


@pytest.mark.parametrize("hard", [True, False])
def test_links_where_the_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard: bool) -> None:
    monkeypatch.setattr(os, "symlink", refuse)
    if not hard:
        monkeypatch.setattr(os, "link", refuse)
    for number in range(2):
        (tmp_path / f"step_{number}.ckpt").write_text(str(number))
        atomic_link(tmp_path / "last.ckpt", tmp_path / f"step_{number}.ckpt")
        assert (tmp_path / "last.ckpt").read_text() == str(number)
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "step_1.ckpt") == hard
    assert len([*tmp_path.iterdir()]) == 3


def test_a_link_that_cannot_replace_a_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "step_1.ckpt").touch()
    with pytest.raises(DataError, match=r"^cannot write .*last\.ckpt"):
        atomic_link(tmp_path / "last.ckpt", tmp_path / "step_1.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "step_1.ckpt"}


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "@SUM(1)", "-2+3", "\t=1"])
def test_a_text_is_no_formula(text: str) -> None:
    assert spreadsheet_text(text) == f"'{text}"


@pytest.mark.parametrize("value", ["a=1", "-1e-5", "+0.5", "", -1.5, None])
def test_numbers_and_other_texts_stay(value: object) -> None:
    assert spreadsheet_text(value) == value


def test_a_file_is_written_where_the_system_has_no_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "chmod", refuse)
    with replacing(tmp_path / "weights") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT, 0o600))  # as a library does that lets its owner alone read it
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_claim_holds_where_the_system_has_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):
        claim(tmp_path / "settings.json", {"beams": 3})
    with pytest.raises(DataError, match="beams=3"):
        claim(tmp_path / "settings.json", {"beams": 4})


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO, errno.EACCES])
def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(opened: Any, *_: Any) -> None:
        raise OSError(number, os.strerror(number), opened)

    durable_rename(write(tmp_path / "a"), tmp_path / "b")
    if number == errno.EACCES:
        monkeypatch.setattr(os, "open", fail)
    else:
        sync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: (fail if stat.S_ISDIR(os.fstat(file).st_mode) else sync)(file))
    if number == errno.EIO:  # the disk is broken
        with pytest.raises(OSError, match="Input/output"):
            durable_rename(write(tmp_path / "a"), tmp_path / "b")
    else:
        durable_rename(write(tmp_path / "a", "new"), tmp_path / "b")
        assert (tmp_path / "b").read_text() == "new"


def write(path: Path, text: str = "old") -> Path:
    path.write_text(text)
    return path


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    with replacing(tmp_path / "new\nline.tar") as left:
        left.write_text("half")
        kept = left.read_bytes()
    left.write_bytes(kept)  # as after a kill
    folder = temporary_folder(tmp_path / "step_1.ckpt")
    folder.mkdir()
    (folder / TEMPORARY).touch()
    (folder / "part").touch()
    mine = [".notes.2024.tmp", ".cache.v1.tmp/deep/precious", f".x.7{TEMPORARY}", f".y{UNFINISHED}/precious"]
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / f".z{UNFINISHED}").symlink_to(tmp_path / ".cache.v1.tmp")
    os.utime(left, (0, time.time() - 90))
    for _ in range(2):
        if (process := os.fork()) == 0:
            with replacing(tmp_path / "table.csv"):
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(process, 0)
    (abandoned,) = tmp_path.glob(".table.csv.*")  # the second process has removed what the first one left
    elsewhere = abandoned.with_name(re.sub("-[0-9a-f]{8}-", f"-{'0' * 8}-", abandoned.name))  # on another machine
    elsewhere.write_bytes(kept)
    remove_leftovers(tmp_path, older=100)  # somebody may be at work on them
    assert left.exists()
    assert elsewhere.exists()
    assert not abandoned.exists()
    assert folder.exists()
    remove_leftovers(tmp_path, older=80)
    assert not left.exists()
    assert folder.exists()
    remove_leftovers(tmp_path)
    assert not elsewhere.exists()
    assert not folder.exists()
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    assert (tmp_path / "new\nline.tar").exists()


def test_an_output_is_made_with_the_settings_of_its_first_writer(tmp_path: Path) -> None:
    file = tmp_path / "new" / "settings.json"
    claim(file, {"seed": 0})
    claim(file, {"seed": 0}, taken=True)
    with pytest.raises(DataError, match=r"seed=0, but now seed=1"):
        claim(file, {"seed": 1})
    with pytest.raises(DataError, match="none"):
        claim(tmp_path / "none", {"seed": 0}, taken=True)
    assert [path.name for path in file.parent.iterdir()] == ["settings.json"]

"""Files on disks that are full, and on systems that lack symbolic links."""

import io
import logging
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from forking import called

from coca_lit.errors import DataError
from coca_lit.files import Waiting, append_lines, atomic_link, write_waiting


def at_most(size: int | None) -> None:
    """This process can write no file longer than that, and a write beyond it is cut off, as on a full disk. Only for
    processes of their own: whatever else a process writes is cut off too.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then it is an error, EFBIG
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


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


@pytest.mark.parametrize("hard", [True, False])
def test_links_where_the_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard: bool) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    if not hard:
        monkeypatch.setattr(os, "link", refuse)
    for number in range(2):
        (tmp_path / f"step_{number}.ckpt").write_text(str(number))
        atomic_link(tmp_path / "last.ckpt", tmp_path / f"step_{number}.ckpt")
        assert (tmp_path / "last.ckpt").read_text() == str(number)
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "step_1.ckpt") == hard
    assert len([*tmp_path.iterdir()]) == 3

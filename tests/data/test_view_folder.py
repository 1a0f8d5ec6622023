"""The cache of views: bounded, and removed by a command."""

import os
import time
from pathlib import Path

import pytest

from coca_lit.data import view_folder
from coca_lit.data.view_folder import size_of, use, why_not_writable
from coca_lit.tools.prepare.command import data


@pytest.fixture
def views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three caches of 100 bytes each, used 3, 2 and 1 days and an hour ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "coca_lit" / "views"
    for days in (3, 2, 1):
        (folder / f"used{days}").mkdir(parents=True)
        (folder / f"used{days}" / "1_0.npy").write_bytes(b"x" * 100)
        then = time.time() - 86_400 * days - 3600
        os.utime(folder / f"used{days}", (then, then))
    return folder


def test_what_was_not_used_for_longest_makes_room(views: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_folder, "MAX_BYTES", 300)
    use(views / "used3")
    assert size_of(views) == 300
    monkeypatch.setattr(view_folder, "MAX_BYTES", 299)
    use(views / "used3")
    assert sorted(path.name for path in views.iterdir()) == ["used1", "used3"]


def test_a_cache_that_may_be_in_use_stays(views: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_folder, "MAX_BYTES", 0)
    os.utime(views / "used2")
    use(views / "used1")
    assert sorted(path.name for path in views.iterdir()) == ["used1", "used2"]


def test_a_folder_that_the_user_names_is_not_bounded(views: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(views / "elsewhere"))
    monkeypatch.setattr(view_folder, "MAX_BYTES", 0)
    use(views / "used1")
    assert size_of(views) == 300


def test_a_command_shows_and_removes_it(views: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (views / "used1" / "2_0.npy").write_bytes(b"x" * 30_000_000)
    data(["cache"])
    assert f"{views}: 0.03 GB" in capsys.readouterr().out
    data(["cache", "--remove"])
    assert not views.exists()
    data(["cache"])
    assert f"{views}: 0.00 GB" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path / "new") == ""
    (tmp_path / "file").touch()
    assert why_not_writable(tmp_path / "file" / "views")

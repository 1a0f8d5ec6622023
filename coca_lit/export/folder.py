"""The folder of an export: complete or not there, and never in place of something else."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CARD = "README.md"
TAG = "coca_lit"  # in the card's front matter, says that a folder is an export


def check_output(output: Path, checkpoint: Path, overwrite: bool) -> None:
    """Raises `ValueError` if the folder must not be written: it holds something, and nobody said that it may go.

    With `overwrite` an earlier export is replaced, and nothing else is.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"'{output}' is a file, and an export is a folder; name another")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"'{output}' is not empty; name another folder, or replace the export in it by overwrite=true")
    if foreign := _foreign(output):
        raise ValueError(
            f"'{output}' holds '{foreign}', which is not of an export, so it is not replaced; name another"
        )
    if checkpoint.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"'{output}' holds the checkpoint itself, so it is not replaced; name another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into, which takes its place when all is written and vanishes on an error."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        for path in unfinished.iterdir():  # safetensors makes files that only their owner can read
            path.chmod(unfinished.stat().st_mode & 0o666)
        _replace(output, unfinished)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone if all went well


def _foreign(folder: Path) -> str | None:
    """The first file that an earlier export, going by its card, did not write."""
    card = (folder / CARD).read_text(errors="replace") if (folder / CARD).is_file() else ""
    known = {CARD, "__pycache__"} if f"\n- {TAG}\n" in card else set()
    names = sorted(path.name for path in folder.iterdir())
    return next((name for name in names if name not in known and not (known and f"\n| `{name}` |" in card)), None)


def _replace(output: Path, new: Path) -> None:
    old = output.with_name(f"{new.name}.old")
    if output.exists():
        output.rename(old)
    try:
        new.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)

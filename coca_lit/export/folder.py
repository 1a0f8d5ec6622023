"""The folder of an export: it appears whole or not at all, and replaces only an earlier export."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CARD = "README.md"
TAG = "coca_lit"  # in the card's front matter, marks a folder as an export


def check_output(output: Path, checkpoint: Path | None = None, overwrite: bool = False) -> None:
    """Raises `ValueError` if the folder must not be written.

    Args:
        checkpoint: what is exported, if it is a file.
        overwrite: replace an earlier export; nothing else is ever replaced.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"'{output}' is a file, but an export is a folder; choose another name")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"'{output}' is not empty; choose another folder, or set overwrite=true to replace an export")
    if foreign := _foreign(output):
        raise ValueError(
            f"'{output}' has '{foreign}', which is not part of an export, so it is not replaced; choose another"
        )
    if checkpoint is not None and checkpoint.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"'{output}' has the checkpoint itself, so it is not replaced; choose another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `output` at the end of the block and is removed on an error."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        for path in unfinished.iterdir():  # safetensors creates files that only their owner can read
            path.chmod(unfinished.stat().st_mode & 0o666)
        _replace(output, unfinished)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone if all went well


def _foreign(folder: Path) -> str | None:
    """The first file that an earlier export did not write, according to its card."""
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

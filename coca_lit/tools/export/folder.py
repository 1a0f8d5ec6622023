"""The folder of an export: it appears whole or not at all, and replaces only an earlier export."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from coca_lit.errors import DataError, UserError
from coca_lit.models import CoCa
from coca_lit.weights.load import save_model

CARD = "README.md"
TAG = "coca_lit"  # in the card's front matter, marks a folder as an export
NEARLY_FULL = 2**16  # bytes that are left on a disk
WEIGHTS = "model.safetensors"
USAGE = """\
import coca_lit
from PIL import Image

model = coca_lit.load_model("{folder}/model.safetensors")
images = coca_lit.build_transform(**model.preprocessing)(Image.open("photo.jpg"))[None]
similarity = model.encode_image(images) @ model.encode_text(model.tokenizer(["a dog", "a cat"])).T
print(similarity)
"""
CAPTION = "print(model.tokenizer.decode(model.generate(images)[0]))\n"


class Exported(NamedTuple):
    """The facts of a format for the card."""

    library: str  # that loads it, by the Hub's name
    files: dict[str, str]  # name -> description
    needs: str  # packages that `usage` needs
    usage: str  # Python code, with {folder} in place of the name of the folder
    check: str  # the comparison that was made, and its result
    limits: list[str]  # sentences, with {folder} too
    warning: str | None = None  # the first of the limits, which the command says as well


def write_safetensors(model: CoCa, folder: Path) -> Exported:
    """Weights and architecture in one file of ours, without the optimizer of a training checkpoint."""
    save_model(model, folder / WEIGHTS)
    return Exported(
        library="coca_lit",
        files={WEIGHTS: "weights in fp32; the architecture and a digest of both in the file's metadata"},
        needs="coca_lit",
        usage=USAGE + (CAPTION if model.decoder is not None else ""),
        check="The file holds the weights of the checkpoint as they are.",
        limits=[],
    )


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
    card = (output / CARD).read_text(errors="replace") if (output / CARD).is_file() else ""
    known = {CARD, "__pycache__"} if f"\n- {TAG}\n" in card else set()
    names = sorted(path.name for path in output.iterdir())
    foreign = next((name for name in names if name not in known and not (known and f"\n| `{name}` |" in card)), None)
    if foreign:
        raise ValueError(
            f"'{output}' has '{foreign}', which is not part of an export, so it is not replaced; choose another"
        )
    if checkpoint is not None and checkpoint.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"'{output}' has the checkpoint itself, so it is not replaced; choose another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `output` at the end of the block and is removed on an error.

    Raises:
        DataError: nothing can be written there.
    """
    output = output.resolve()
    unfinished = output.with_name(f".{output.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in unfinished.iterdir():  # safetensors creates files that only their owner can read
            path.chmod(unfinished.stat().st_mode & 0o666)
        _replace(output, unfinished)
    except Exception as error:
        if _disk_full(error, output.parent):
            raise DataError(f"cannot write {output}: no space is left on the disk") from error
        if isinstance(error, OSError):
            raise DataError(f"cannot write {output}: {error.strerror or error}") from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone if all went well


def _disk_full(error: BaseException, folder: Path) -> bool:
    """Libraries say so by errors of their own types, onnx only by failing to parse the half file that it wrote."""
    if not isinstance(error, UserError) and shutil.disk_usage(folder).free < NEARLY_FULL:
        return True
    cause: BaseException | None = error
    while cause is not None and "No space left" not in str(cause):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


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

"""Weights that are what was written: damage is found wherever they are read.

PyTorch's files are zip archives whose checksums PyTorch never reads. Safetensors have none, so ours carry a digest in
their metadata. PyTorch's files from before 1.6 and safetensors of others have nothing to compare with.
"""

import hashlib
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

from coca_lit.files import replacing
from coca_lit.models.init import Uninitialised
from coca_lit.reading import open_regular

Module = TypeVar("Module", bound=nn.Module)

ZIP = b"PK\x03\x04"  # the first bytes of one
DIGEST_KEY = "coca_lit_digest"


class ContentError(ValueError):
    """What a file holds is not read; it may be what was written."""


def check_archive(path: Path, checksums: bool = True) -> bool:
    """Whether a file of PyTorch's is a zip archive and not of the format before 1.6; raises `ValueError` if it is not
    whole, or a program.

    Args:
        checksums: read all of it, to compare what it holds with its checksums.
    """
    try:
        with open_regular(path) as file:
            if file.read(len(ZIP)) != ZIP:
                return False
            with zipfile.ZipFile(file) as archive:
                if any("/code/__torch__" in name for name in archive.namelist()):
                    raise ContentError(
                        "it is a program of TorchScript: save its state_dict(), or name a released model"
                    )
                damaged = archive.testzip() if checksums else None
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error
    if damaged is not None:
        raise ValueError(f"its part '{damaged}' is not what was written")
    return True


def save_tensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes safetensors with a digest of tensors and metadata, the same bytes for the same content. Tensors must not
    share memory.

    Raises:
        DataError: nothing can be written there.
    """
    written = dict(metadata or {})
    with replacing(path) as temporary:
        save_file(dict(state), temporary, metadata={**written, DIGEST_KEY: _digest(state, written)})
        # The library writes metadata in random order: the length of the header (8 bytes), the header, then the data.
        with temporary.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
            if len(text) == length:
                file.seek(8)
                file.write(text)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of safetensors.

    Raises:
        ValueError: the file is no such file, or was damaged after we wrote it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is not a readable safetensors file: {error}") from error
    expected = metadata.pop(DIGEST_KEY, None)
    if expected is not None and expected != _digest(state, metadata):
        raise ValueError(f"'{path}' is damaged: its content is not what was written; fetch or export it again")
    return state, metadata


def digest(about: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """32 hexadecimal digits, equal for equal descriptions and tensors that are equal by name and bit for bit."""
    found = hashlib.sha256(about.encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _digest(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return digest(json.dumps(metadata, sort_keys=True), sorted(state.items()))


def without_memory(make: Callable[[], Module]) -> Module:
    """What `make` builds, on the device "meta": its names and shapes."""
    with torch.device("meta"), Uninitialised(), warnings.catch_warnings(action="ignore"):
        return make()

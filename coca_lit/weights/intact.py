"""Weights that are what was written, and no larger than what is stored: damage and forgery are found wherever they are
read, and a file takes no more memory and time than its size justifies, whatever it claims.

PyTorch's files are zip archives whose checksums PyTorch never reads. Safetensors have none, so ours carry a digest in
their metadata. PyTorch's files from before 1.6 and safetensors of others have nothing to compare with.

Tensors are as large as what is stored of them, and a model is first built without memory: it must not have more
parameters than its file has tensors, nor more numbers than they hold.
"""

import hashlib
import json
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from coca_lit.files import replacing
from coca_lit.models.init import Uninitialised
from coca_lit.reading import open_regular

Module = TypeVar("Module", bound=nn.Module)

ZIP = b"PK\x03\x04"  # the first bytes of one
DIGEST_KEY = "coca_lit_digest"
MAX_PICKLE = 8 * 2**20  # bytes that describe the tensors of a file of PyTorch's; each can become a list of 64
# Of what PyTorch lets a pickle call, these make more than they are given: zeros, "hex" of "hex" of a text, a tensor of
# a list that holds another one many times, a copy of a tensor that repeats a number.
_TAKES_MEMORY = re.compile(
    rb"c(?:__builtin__|builtins)\nbytearray\n|c_codecs\nencode\n"
    rb"|ctorch[.\w]*\n[.\w]*(?:Tensor|TypedStorage|_rebuild_device_tensor_from_cpu_tensor)\n"
)
SHARED = 2  # how often what is stored may be used, as by tied weights
SPARE = 2**25  # numbers of tables that are built and not stored: masks, angles of rotary positions
MAX_PATCHES = 2**16  # of an image of any shape: 4,096 pixels squared in patches of 16
MAX_CONTEXT = 2**16  # tokens of a text
MAX_VALUES = 10**6  # in the description of a model; the words of a tokenizer are the most


class ContentError(ValueError):
    """What a file holds is not read; it may be what was written."""


def check_archive(path: Path, checksums: bool = True) -> bool:
    """Whether a file of PyTorch's is a zip archive and not of the format before 1.6; raises `ValueError` if it is not
    whole, or would take more memory than its size.

    Args:
        checksums: also read all of it, to compare what it holds with its checksums.
    """
    try:
        with open_regular(path) as file:
            if file.read(len(ZIP)) != ZIP:
                file.seek(0)
                _check_pickles(file)
                return False
            size = file.seek(0, 2)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if any("/code/__torch__" in member.filename for member in members):
                    raise ContentError(
                        "it is a program of TorchScript: save its state_dict(), or name a released model"
                    )
                if packed := [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]:
                    raise ValueError(f"its part '{packed[0]}' is compressed: expected a file of torch.save")
                if sum(member.file_size for member in members) > size:
                    raise ValueError("its parts overlap")
                damaged = archive.testzip() if checksums else None
            # PyTorch may find other parts than zipfile: under names in capitals, in a second directory.
            file.seek(0)
            reader = torch._C.PyTorchFileReader(file)
            names = reader.get_all_records()
            if sum(map(reader.get_record_size, names)) > size:
                raise ValueError("its parts overlap")
            if any(name.lower() == "data.pkl" for name in names):
                _check_pickle(reader.get_record_size("data.pkl"), reader.get_record("data.pkl"))
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error
    if damaged is not None:
        raise ValueError(f"its part '{damaged}' is not what was written")
    return True


def _check_pickles(file: BufferedReader) -> None:
    """Those at the beginning of a file of the old format, before the numbers of the tensors."""
    with suppress(ValueError, IndexError, MemoryError):  # no pickle, or one text of terabytes: PyTorch says so
        for _ in range(5):  # mark, version, machine, content, keys of the tensors
            for _ in pickletools.genops(file):
                if file.tell() > MAX_PICKLE:
                    break
    size = file.tell()
    file.seek(0)
    _check_pickle(size, file.read(MAX_PICKLE))


def _check_pickle(size: int, content: bytes) -> None:
    if size > MAX_PICKLE:
        raise ContentError(f"it describes its tensors in more than {MAX_PICKLE:,} bytes")
    if found := _TAKES_MEMORY.search(content):
        raise ContentError(f"it holds code ({found[0].split()[-1].decode()})")


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


def check_stored(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises `ValueError` unless the tensors are ordinary ones whose numbers are stored in the file, or in the files of
    the folder.
    """
    storages: dict[int, int] = {}
    claimed = 0
    for name, tensor in tensors.items():
        empty = not tensor.numel() and tensor.shape != (0,)  # such as (0, 10**18)
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or empty:
            raise ValueError(f"'{name}' is empty or no ordinary tensor")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        claimed += tensor.nbytes
    held = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else (path,)))
    stored = min(sum(storages.values()), held)  # a pickle can make storages that the file lacks
    if sum(storages.values()) > held or claimed > SHARED * stored:
        raise ValueError(f"its tensors claim {claimed:,} bytes, and {stored:,} are stored")


def check_plain(config: Any) -> None:
    """Raises `ValueError` unless a description of a model is plain values, not too many and not nested deeply: a pickle
    of a few bytes can hold a list that holds another one twice, and so on.
    """
    level, count = [config], 1
    for _ in range(8):
        if other := [node for node in level if not isinstance(node, dict | list | tuple | str | int | float | None)]:
            raise ValueError(f"its description of a model holds a {type(other[0]).__name__}")
        dicts = [node for node in level if isinstance(node, dict)]
        lists = [node for node in level if isinstance(node, list | tuple)]
        count += sum(map(len, lists)) + 2 * sum(map(len, dicts))
        if count > MAX_VALUES:
            raise ValueError(f"its description of a model has more than {MAX_VALUES:,} values")
        level = [child for node in (*lists, *dicts, *(node.values() for node in dicts)) for child in node]
        if not level:
            return
    raise ValueError("its description of a model is nested too deeply")


def without_memory(make: Callable[[], Module], tensors: Mapping[str, Tensor]) -> Module:
    """What `make` builds for the tensors of a file, on the device "meta".

    Raises:
        RuntimeError: it is larger than they are.
    """
    most, found = 2 * len(tensors) + 2048, 0  # some parts are built and replaced; as many take no time

    def count(*_: object) -> None:
        nonlocal found
        found += 1
        if found > most:
            raise RuntimeError(f"the model has more than {most} tensors, and the file {len(tensors)}")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), Uninitialised(), warnings.catch_warnings(action="ignore"):
            model = make()
    finally:
        hook.remove()
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(tensor.numel() for tensor in tensors.values())
    if needed > held + SPARE:
        raise RuntimeError(f"the model has {needed:,} numbers, and the file {held:,}")
    return model

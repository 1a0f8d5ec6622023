"""Shards as img2dataset writes them, small and by hand."""

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from PIL import Image

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.batch import Batch
from coca_lit.data.shards.scan import read_shard
from coca_lit.data.shards.shard import Shard
from coca_lit.tokenizer import WordTokenizer
from coca_lit.tools.prepare.command import data as coca_data

TOKENIZER = WordTokenizer(["a", "dog", "number"])


def jpeg(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 18), (shade % 256, 100, 50)).save(buffer, "JPEG")
    return buffer.getvalue()


def members(key: str, shade: int = 0) -> dict[str, bytes]:
    fields = json.dumps({"caption": "from the alt text", "recaption": "a dog", "key": key}).encode()
    return {f"{key}.jpg": jpeg(shade), f"{key}.txt": b" a dog number \n", f"{key}.json": fields}


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, shards: int, per_shard: int) -> list[Path]:
    """Shard s has the keys s0000, s0001, ..."""
    return [
        write_tar(
            folder / f"{s:05d}.tar",
            {name: data for i in range(per_shard) for name, data in members(f"{s}{i:04d}", 7 * i).items()},
        )
        for s in range(shards)
    ]


@contextmanager
def in_memory(local: Path, shards: int, per_shard: int) -> Iterator[fsspec.AbstractFileSystem]:
    """memory://set with shards, their manifest and indexes, and the same in a new folder on disk."""
    local.mkdir()
    write_shards(local, shards, per_shard)
    coca_data(["check", str(local), "--workers", "1"])
    filesystem = fsspec.filesystem("memory")
    for path in local.iterdir():
        filesystem.pipe_file(f"/set/{path.name}", path.read_bytes())
    yield filesystem
    filesystem.rm("/set", recursive=True)


def spoil(path: Path, changes: dict[str, bytes | None]) -> None:
    """Rewrite a shard with some members replaced, or left out where the value is None."""
    with tarfile.open(path) as tar:
        files = {info.name: tar.extractfile(info).read() for info in tar.getmembers()}
    write_tar(path, {name: data for name, data in (files | changes).items() if data is not None})


def read(path: Path, caption_key: str = "txt") -> tuple[list[str], dict[str, int]]:
    bad = BadSamples(1.0)
    keys = [record.id for record in read_shard(Shard(str(path)), [caption_key], bad)]
    assert bad.seen == len(keys) + bad.reasons.total()
    return keys, dict(bad.reasons)


def contents(batch: Batch) -> tuple:
    return batch.keys, batch.tokens.tolist(), batch.images.tolist()

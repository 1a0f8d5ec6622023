"""A small file takes little memory and time, whatever it claims: in a process of its own with a gigabyte to spare."""

import io
import json
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from coca_lit.errors import UserError
from coca_lit.models import create_model
from coca_lit.weights import MODEL_KEY
from coca_lit.weights.load import load_dual_encoder
from coca_lit.weights.open_clip import to_open_clip
from helpers.forking import FORKSERVER

pytestmark = pytest.mark.slow  # a process whose memory has a limit


def load_each(asked: Connection) -> None:
    """Answers the path of a file with the megabytes and seconds that it took to load, and what was said. The process
    may have a gigabyte more than its imports took.
    """
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 2**30, resource.RLIM_INFINITY))
    while True:
        path = asked.recv()
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            load_dual_encoder(path)
            said = "loaded"
        except (ValueError, UserError) as error:
            said = " ".join(str(error).split())
        except BaseException as error:
            said = f"raised {error!r}"
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        asked.send((most / 1024, time.process_time() - start, said))


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[Path], str]]:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    asked, its_end = FORKSERVER.Pipe()
    child = FORKSERVER.Process(target=load_each, args=(its_end,))
    child.start()
    its_end.close()

    def refused(path: Path) -> str:
        asked.send(path)
        megabytes, seconds, said = asked.recv()
        assert megabytes < 700, said
        assert seconds < 20, said
        assert said != "loaded"
        assert not said.startswith("raised"), said
        return said

    yield refused
    child.kill()
    child.join()


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    torch.manual_seed(0)
    model = create_model("coca_tiny")
    return {"state_dict": {f"net.{name}": t for name, t in model.state_dict().items()}, MODEL_KEY: asdict(model.config)}


@pytest.fixture(scope="module")
def open_clip() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = create_model(
        "coca_vit_b32",
        image_encoder_args={"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 1},
        **{"image_size": 32, "embed_dim": 32, "pooler_queries": 3, "context_length": 10, "text_width": 32},
        **{"text_layers": 1, "text_heads": 1, "decoder_layers": 1, "cls_mask": "legacy"},
    )
    return to_open_clip(model)


def packed(path: Path, change: Callable[[str, bytes], bytes], how: int = zipfile.ZIP_DEFLATED) -> None:
    """Writes a file of PyTorch's again, with other content and compression."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def test_compressed_tensors(load: Callable[[Path], str], tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, tmp_path / "x.pt")
    packed(tmp_path / "x.pt", lambda name, content: bytes(2**26) if "/data/" in name else content)
    assert (tmp_path / "x.pt").stat().st_size < 10**7
    assert "compressed" in load(tmp_path / "x.pt")


def test_a_compressed_pickle(load: Callable[[Path], str], tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, tmp_path / "x.pt")
    bomb = b"\x80\x02" + b"]" * 10**8 + b"."
    packed(tmp_path / "x.pt", lambda name, content: bomb if name.endswith("data.pkl") else content)
    assert "compressed" in load(tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_long_pickle(load: Callable[[Path], str], tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(4)}, path, _use_new_zipfile_serialization=zipped)
    if zipped:
        lists = b"\x80\x02" + b"]" * (2 * 10**7) + b"."
        packed(path, lambda name, content: lists if name.endswith("data.pkl") else content, zipfile.ZIP_STORED)
    else:
        start = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})]
        texts = b"\x80\x02(" + (b"X" + (2**16).to_bytes(4, "little") + b"x" * 2**16) * 150 + b"l."
        path.write_bytes(b"".join(start) + texts)
    assert "bytes" in load(path)


def with_pickle(path: Path, content: bytes) -> Path:
    """A file of PyTorch's with this pickle in the place of its own."""
    torch.save({"w": torch.zeros(4)}, path)
    packed(path, lambda name, was: content if name.endswith("data.pkl") else was, zipfile.ZIP_STORED)
    return path


def test_a_pickle_that_asks_for_zeros(load: Callable[[Path], str], tmp_path: Path) -> None:
    zeros = b"\x80\x02c__builtin__\nbytearray\nJ" + struct.pack("<i", 2**31 - 1) + b"\x85R."
    assert "bytearray" in load(with_pickle(tmp_path / "x.pt", zeros))


def text(word: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word


def hex_of_hex(levels: int = 26) -> bytes:
    content = text(b"x" * 16)
    for codec in (b"latin1", *[b"hex"] * levels):
        content = b"c_codecs\nencode\n" + content + text(codec) + b"\x86R"
    return b"\x80\x02" + content + b"."


def tensor_of_lists(name: bytes) -> bytes:
    """A list of 50 numbers, 50 times in another one, and so on: 300 million numbers."""
    lists = b"](" + b"K\x01" * 50 + b"eq\0"
    for level in range(1, 5):
        lists += b"](" + (b"h" + bytes([level - 1])) * 50 + b"eq" + bytes([level])
    return b"\x80\x02(" + lists + b"c" + name + b"\nh\x04\x85Rt."


def copy_of_one_number() -> bytes:
    tensor = io.BytesIO()
    torch.save(torch.zeros(4)[:1].expand(2**28), tensor)
    with zipfile.ZipFile(tensor) as archive:
        content = next(archive.read(name) for name in archive.namelist() if name.endswith(".pkl"))
    call = b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n("
    return b"\x80\x02" + call + content[2:-1] + b"ctorch\nfloat64\n" + text(b"cpu") + b"\x89tR."


@pytest.mark.parametrize(
    ("content", "called"),
    [
        (hex_of_hex(), "encode"),
        (tensor_of_lists(b"torch\nTensor"), "Tensor"),
        (tensor_of_lists(b"torch.cuda\nHalfTensor"), "HalfTensor"),
        (tensor_of_lists(b"torch\nstorage.TypedStorage"), "storage.TypedStorage"),
        (copy_of_one_number(), "_rebuild_device_tensor_from_cpu_tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pickle_whose_calls_make_more_than_it_holds(
    load: Callable[[Path], str], tmp_path: Path, content: bytes, called: str
) -> None:
    assert f"it holds code ({called})" in load(with_pickle(tmp_path / "x.pt", content))


def test_a_pickle_under_a_name_in_capitals(load: Callable[[Path], str], tmp_path: Path) -> None:
    """PyTorch finds it all the same."""
    path = with_pickle(tmp_path / "x.pt", tensor_of_lists(b"torch\nTensor"))
    path.write_bytes(path.read_bytes().replace(b"data.pkl", b"DATA.PKL"))
    assert "it holds code (Tensor)" in load(path)


def test_a_second_directory(load: Callable[[Path], str], tmp_path: Path) -> None:
    """PyTorch reads the one where the end of the file says; zipfile the one before that end, and moves its parts."""
    first = with_pickle(tmp_path / "x.pt", tensor_of_lists(b"torch\nTensor") + bytes(1000)).read_bytes()
    second = with_pickle(tmp_path / "x.pt", b"\x80\x02}.").read_bytes()
    size, start = struct.unpack("<II", first[-10:-2])
    others = bytearray(second[struct.unpack("<I", second[-6:-2])[0] : -22])
    parts = second[: -22 - len(others)]
    assert len(others) == size
    at = 0
    while at < size:  # an entry: 46 bytes, then name and more, whose lengths it holds, with its place
        place = struct.unpack("<I", others[at + 42 : at + 46])[0] + start - len(parts)
        others[at + 42 : at + 46] = struct.pack("<I", place)
        at += 46 + sum(struct.unpack("<HHH", others[at + 28 : at + 34]))
    (tmp_path / "x.pt").write_bytes(first[:-22] + parts + others + first[-22:])
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.read("x/data.pkl") == b"\x80\x02}."
    assert "it holds code (Tensor)" in load(tmp_path / "x.pt")


def test_a_text_of_terabytes(load: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 2**45))
    assert "it is not a file that torch.save writes" in load(tmp_path / "x.pt")


def test_tensors_that_the_file_does_not_hold(
    load: Callable[[Path], str], tmp_path: Path, open_clip: dict[str, Tensor]
) -> None:
    """A pickle may make a storage and set it into a parameter."""

    def numbers(*values: int) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    content = b"\x80\x02}"
    for name, tensor in open_clip.items():
        storage = b"ctorch.storage\nUntypedStorage\n" + numbers(tensor.nbytes) + b"R"
        sizes = numbers(*tensor.shape) + numbers(*tensor.stride())
        made = b"ctorch.nn.parameter\nParameter\nN\x89\x86R"
        content += text(name.encode()) + made + b"(" + storage + b"K\0" + sizes + b"tbs"
    assert "are stored" in load(with_pickle(tmp_path / "x.pt", content + b"."))


def test_parts_that_overlap(load: Callable[[Path], str], tmp_path: Path) -> None:
    """A hundred entries of the archive's directory lead to the same megabytes."""
    torch.save({"w": torch.zeros(2**22)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        archive.filelist.extend([next(m for m in archive.infolist() if "/data/" in m.filename)] * 100)
        archive.writestr("more", b"")
    assert "overlap" in load(tmp_path / "x.pt")


def test_low_rank_updates_that_claim_a_matrix(
    load: Callable[[Path], str], tmp_path: Path, ours: dict[str, Any]
) -> None:
    name = "net.text.blocks.0.attention.out"
    state = dict(ours["state_dict"])
    inside = f"{name}.parametrizations.weight"
    state[f"{inside}.original"] = state.pop(f"{name}.weight")
    state |= {f"{inside}.0.a": torch.zeros(1, 10**5), f"{inside}.0.b": torch.zeros(10**5, 1)}
    state[f"{inside}.0.scale"] = torch.zeros(())
    torch.save({"state_dict": state, MODEL_KEY: ours[MODEL_KEY]}, tmp_path / "x.ckpt")
    assert "low-rank" in load(tmp_path / "x.ckpt")


def pairs_of_itself() -> tuple[Any, ...]:
    node: tuple[Any, ...] = (1, 1)
    for _ in range(50):
        node = (node, node)
    return node


@pytest.mark.parametrize(
    ("tensors", "sizes", "said"),
    [
        *(
            ({}, sizes, "is damaged")
            for sizes in (
                {"text_layers": 4096},
                {"decoder_layers": 4096, "text_layers": 4096},
                {"image_encoder": "resnet50", "image_encoder_args": {"layers": [4096] * 4}},
                {"image_encoder": "vit_base_patch32_clip_224", "image_encoder_args": {"depth": 4096}},
                {"text_width": 4096, "text_heads": 1},
                {"context_length": 10**12},
                {"context_length": 10**6, "text_tower": "modern"},
            )
        ),
        ({"text.position_embedding": torch.zeros(1).expand(1_500_000, 96)}, {"context_length": 1_499_999}, "stored"),
        (dict.fromkeys(map(str, range(1000)), torch.zeros(10**6)), {}, "stored"),
        ({"x": torch.zeros(10**9, 0)}, {"embed_dim": 10**6}, "empty"),
        ({}, {"text_layers": pairs_of_itself()}, "nested"),
        ({}, {"text_layers": [[0] * 10**5] * 3000}, "more than 1,000,000 values"),
    ],
    ids=[
        *("layers", "layers of both", "layers of the trunk", "depth", "width", "context", "context without positions"),
        *("a tensor of one number", "many names of one tensor", "an empty tensor", "a pair of pairs", "a long list"),
    ],
)
def test_forged_sizes(
    load: Callable[[Path], str],
    tmp_path: Path,
    ours: dict[str, Any],
    tensors: dict[str, Tensor],
    sizes: dict[str, Any],
    said: str,
) -> None:
    """Also with a tensor that would explain the size, stored as one number or none, and with endless descriptions."""
    state = ours["state_dict"] | {f"net.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": state, MODEL_KEY: ours[MODEL_KEY] | sizes}, tmp_path / "x.ckpt")
    assert said in load(tmp_path / "x.ckpt")


def test_a_long_description(load: Callable[[Path], str], tmp_path: Path, ours: dict[str, Any]) -> None:
    state = {name.removeprefix("net."): tensor.contiguous() for name, tensor in ours["state_dict"].items()}
    text = json.dumps(ours[MODEL_KEY])[:-1] + ', "x": [' + "[]," * (8 * 10**6) + "[]]}"
    save_file(state, tmp_path / "x.safetensors", {MODEL_KEY: text})
    assert "bytes" in load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("visual.positional_embedding", (4000**2 + 1, 1)), ("text.positional_embedding", (4 * 10**6, 1))],
)
def test_sizes_of_open_clip(
    load: Callable[[Path], str],
    tmp_path: Path,
    open_clip: dict[str, Tensor],
    name: str,
    shape: tuple[int, int],
    empty: bool,
) -> None:
    tensor = torch.zeros(shape[0], 0) if empty else torch.zeros(shape, dtype=torch.int8)
    torch.save(open_clip | {name: tensor}, tmp_path / "x.pt")
    assert ("empty" if empty else "numbers") in load(tmp_path / "x.pt")


@pytest.mark.parametrize("size", [0, 1])
def test_layers_of_open_clip(
    load: Callable[[Path], str], tmp_path: Path, open_clip: dict[str, Tensor], size: int
) -> None:
    layers = {f"text.transformer.resblocks.{i}.x": torch.zeros(size) for i in range(5000)}
    save_file(open_clip | layers, tmp_path / "x.safetensors")
    assert "damaged" in load(tmp_path / "x.safetensors")


def test_a_config_beside_the_weights(load: Callable[[Path], str], tmp_path: Path, open_clip: dict[str, Tensor]) -> None:
    save_file(open_clip, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").touch()
    with (tmp_path / "open_clip_config.json").open("wb") as file:
        file.truncate(2 * 2**30)
    assert "bytes" in load(tmp_path / "open_clip_model.safetensors")

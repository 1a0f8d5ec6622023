"""What a stranger can hand us and what a user can leak: each is refused with a clear message, at the public entries."""

import gzip
import io
import json
import os
import pickle
import re
import resource
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image
from pyarrow import parquet
from running import compose, train_py
from safetensors.torch import save_file

import coca_lit
from coca_lit.callbacks.bad_sample_log import BadSampleLog
from coca_lit.cli.train import run, train
from coca_lit.data.bad_samples import BadSample, BadSamples
from coca_lit.data.batch import Batch
from coca_lit.data.curate.choose import filter_scores
from coca_lit.data.curate.scores import read_about
from coca_lit.data.datasets.choice import (
    SUGARCREPE,
    aro_order_records,
    aro_records,
    sugarcrepe_records,
    winoground_records,
)
from coca_lit.data.datasets.clip_benchmark import classified_shards
from coca_lit.data.datasets.coco import coco_folder_records
from coca_lit.data.datasets.long_captions import docci_records, sharegpt4v_records, urban1k_records
from coca_lit.data.prepare.check import JOURNAL as CHECK_JOURNAL
from coca_lit.data.prepare.check import check_shards
from coca_lit.data.prepare.write import JOURNAL, plan_shards, prepare
from coca_lit.data.records import MAX_IMAGE, ImageFile, Record, decode_image
from coca_lit.data.shards.datamodule import LAIONDataModule
from coca_lit.data.shards.indexed import tar_indexes
from coca_lit.data.shards.listing import MANIFEST, Shard, find_shards
from coca_lit.data.shards.reader import read_shard
from coca_lit.data.shards.selection import read_selection
from coca_lit.data.shards.tar import MAX_HEADER, MAX_MEMBER
from coca_lit.data.text_batches import read_texts
from coca_lit.data.transforms import load_pixels
from coca_lit.errors import CheckpointError, ConfigError, DataError
from coca_lit.evals.chair import Chair
from coca_lit.inference.outputs import open_writer
from coca_lit.inference.search import ImageIndex
from coca_lit.inference.shards import scan_shard
from coca_lit.models import create_model
from coca_lit.report.runs import read_run
from coca_lit.runs.checkpoint_io import inspect
from coca_lit.runs.redaction import mask, redact
from coca_lit.runs.run_folder import start_run_folder
from coca_lit.tokenizer import get_tokenizer
from coca_lit.weights import MODEL_KEY, sharded

TOKENIZER = get_tokenizer("clip")


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.fixture
def target(tmp_path: Path):
    """A file that hostile input tries to make."""
    path = tmp_path / "outside" / "ran"
    path.parent.mkdir()
    yield path
    assert not path.exists()


def jpeg(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 18), (shade, 100, 50)).save(buffer, "JPEG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def good(texts: str = "txt", text: bytes = b"a dog") -> dict[str, bytes]:
    """The members of eight samples."""
    pairs = [(f"good{i}", jpeg(i)) for i in range(8)]
    return {name: data for key, image in pairs for name, data in ((f"{key}.jpg", image), (f"{key}.{texts}", text))}


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def train_on(path: Path, batches: int = 4, **more) -> tuple[set[str], list[BadSample], list[Batch]]:
    """Keys and bad samples of some batches that the training loader makes of a shard, or of all in a folder."""
    more = {"indexed": False, "shuffle_buffer": 1, "max_bad_fraction": 1.0} | more
    data = LAIONDataModule(
        shards=str(path), epoch_samples=4 * batches, tokenizer=TOKENIZER, batch_size=4, image_size=16, **more
    )
    data.prepare_data()
    seen = list(islice(data.train_dataloader(), batches))
    return (
        {key.rpartition("/")[2] for batch in seen for key in batch.keys},
        [b for batch in seen for b in batch.bad],
        seen,
    )


def benchmark_set(folder: Path, member: str = "a.cls", label: bytes = b"0", shards: str = "1") -> Path:
    """A data set in CLIP_benchmark's layout with one image."""
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("dog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    (folder / "test" / "nshards.txt").write_text(shards)
    write_tar(folder / "test" / "0.tar", {"a.jpg": jpeg(), member: label})
    return folder


# Annotations of evaluations

BOX = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 9, "bbox_h": 9}
VG = {"image_path": "a.jpg", "true_caption": "a", "false_caption": "b", "relation_name": "on", **BOX}
CREPE = {"filename": "a.jpg", "caption": "a", "negative_caption": "b"}
WINO = {"id": 0, "image_0": "a", "image_1": "b", "caption_0": "a b", "caption_1": "b a"}
TALK = [{"value": "?"}, {"value": "a dog"}]


def relations(root: Path) -> list[Record]:
    return aro_records(root, "relation")


def coco_order(root: Path) -> list[Record]:
    return aro_order_records(root, "coco", tag=lambda text: [(word, "NN") for word in text.split()])


def share(root: Path) -> list[Record]:
    return sharegpt4v_records(root, "list.json")


def objects(root: Path) -> Chair:
    return Chair(root / "synonyms.txt", root / "instances.json")


@pytest.mark.parametrize(
    ("read", "name", "content", "said"),
    [
        (sugarcrepe_records, "add_obj.json", [], "it holds a list, not an object"),
        (
            sugarcrepe_records,
            "add_obj.json",
            {"0": {"filename": "a.jpg", "caption": 1, "negative_caption": "b"}},
            "text",
        ),
        (
            sugarcrepe_records,
            "add_obj.json",
            {"0": {"filename": "a.jpg", "caption": "a"}},
            "'negative_caption' is miss",
        ),
        (winoground_records, "examples.jsonl", b"{\n", "line 1 of .* is not a readable JSON file"),
        (winoground_records, "examples.jsonl", b"[" * 100_000, "nested too deeply"),
        (winoground_records, "examples.jsonl", WINO | {"image_0": "../a"}, "images .*not found|lists, e.g."),
        (winoground_records, "examples.jsonl", WINO | {"caption_1": ["x"]}, "expected a text"),
        (relations, "visual_genome_relation.json", {}, "it holds an object, not a list"),
        (relations, "visual_genome_relation.json", [VG | {"bbox_w": 1e99}], "a box of whole numbers"),
        (relations, "visual_genome_relation.json", [VG | {"bbox_w": 10**30}], "a box of whole numbers"),
        (relations, "visual_genome_relation.json", [VG | {"relation_name": 7}], "ARO's schema"),
        (coco_order, "coco_karpathy_test.json", [{"image": "a.jpg", "caption": "a dog"}], "expected texts"),
        (coco_order, "coco_karpathy_test.json", [{"image": 7, "caption": []}], "BLIP's schema"),
        (
            docci_records,
            "docci_descriptions.jsonlines",
            {"split": "test", "example_id": 1.5},
            "'image_file' is missing",
        ),
        (share, "list.json", [{"image": "/etc/a.jpg", "conversations": TALK}], "leads out of the folder"),
        (share, "list.json", [{"image": "../a.jpg", "conversations": TALK}], "leads out of the folder"),
        (share, "list.json", [{"image": "a.jpg", "conversations": 7}], "ShareGPT4V's schema"),
        (share, "list.json", [{"image": "a.jpg", "conversations": []}], "ShareGPT4V's schema"),
        (share, "list.json", b"[" * 100_000, "not a readable JSON file"),
        (share, "list.json", b"{}", "it holds no list"),
        (objects, "synonyms.txt", b"\xff\xfe", "cannot be read"),
        (objects, "synonyms.txt", b"a," * 2**20, "a line for each object"),
        (objects, "instances.json", {"categories": [{"id": 1, "name": ["dog"]}]}, "COCO's instances schema"),
        (objects, "instances.json", {"categories": [], "annotations": [{"image_id": 1.5}]}, "an id, a text"),
    ],
)
def test_annotations_of_evaluations(tmp_path, read, name, content, said):
    (tmp_path / "synonyms.txt").write_text("dog, puppy\n")
    (tmp_path / "instances.json").write_text("{}")
    for kind in SUGARCREPE:
        (tmp_path / f"{kind}.json").write_text("{}")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg())
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(DataError, match=said):
        read(tmp_path)


def test_a_box_that_claims_gigabytes_takes_no_memory(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg())
    boxes = [
        BOX | {"bbox_w": 2**40, "bbox_h": 2**40},
        BOX | {"bbox_x": 2**40},
        BOX | {"bbox_y": -9},
        BOX | {"bbox_w": 0},
    ]
    (tmp_path / "visual_genome_relation.json").write_text(json.dumps([VG | box for box in boxes]))
    first, *others = relations(tmp_path)
    assert first.image().size == (20, 18)  # no more than there is
    for record in others:
        with pytest.raises(DataError, match="does not lie in"):
            record.image()


def test_a_caption_that_is_a_fifo_does_not_block(tmp_path):
    (tmp_path / "caption").mkdir()
    os.mkfifo(tmp_path / "caption" / "1.txt")
    with pytest.raises(DataError, match="not a regular file"):
        urban1k_records(tmp_path)


# Files that are code


@pytest.mark.parametrize("key", ["init_from", "init_parts.image_encoder", "ckpt_path"])
def test_pickle_as_checkpoint_of_a_training(tmp_path, target, key):
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Evil(target)))
    cfg = compose("trainer=smoke", f"{key}={tmp_path}/evil.ckpt", f"output_dir={tmp_path}/run", "name=x")
    with pytest.raises(Exception, match=r"(?i)checkpoint|weights.only"):
        run(cfg)


def test_pickle_as_model(tmp_path, target):
    torch.save({"state_dict": Evil(target)}, tmp_path / "evil.ckpt")
    with pytest.raises(
        ValueError, match=r"not a checkpoint of tensors and plain values alone, .*: it holds code"
    ) as caught:
        coca_lit.load_model(tmp_path / "evil.ckpt")
    assert "weights_only" not in str(caught.value)
    with pytest.raises(CheckpointError, match="more than tensors and plain values: it holds code") as caught:
        inspect(tmp_path / "evil.ckpt")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b'{"a": 1}', b"hello", bytes(1000), pickle.dumps([1])])
def test_what_is_no_checkpoint(tmp_path, content):
    """PyTorch advises to load it as code."""
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"it is not a file that torch\.save writes|expected a dictionary") as caught:
        coca_lit.load_model(tmp_path / "x.ckpt")
    assert "weights_only" not in str(caught.value)


def test_a_list_of_captions(tmp_path):
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(DataError, match=r"captions\.json does not follow the COCO captions schema: .* list") as caught:
        coco_folder_records(tmp_path)
    assert "indices" not in str(caught.value)


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir", "hf_hub_id"])
def test_weights_that_name_other_files(tmp_path, target, key):
    """timm would load them: `torch.load` of an older timm even runs the code in them."""
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(target)))
    model = coca_lit.create_model("coca_tiny")
    model.config["image_encoder_args"] |= {key: str(tmp_path / "evil.pth")}
    coca_lit.save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"hands image_encoder_args.{key} to timm, which is no part of an arch"):
        coca_lit.load_model(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"init_from: .* hands image_encoder_args.{key} to timm"):
        run(compose("trainer=smoke", f"init_from={tmp_path}/model.safetensors", f"output_dir={tmp_path}/run", "name=x"))


def test_config_that_evaluates(tmp_path, target, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["train.py", f"""threads=${{eval:'__import__("pathlib").Path("{target}").touch()'}}"""]
    )
    with pytest.raises(SystemExit, match=r"error: .*Unsupported interpolation type eval"):
        train()


@pytest.mark.parametrize("forged", [{"embed_dim": 40_000}, {"decoder_layers": 10**9}, {"embed_dim": 10**30}])
def test_a_checkpoint_that_claims_a_size_takes_no_memory(tmp_path, forged):
    model = create_model("coca_tiny")
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "coca_lit_model": model.config | forged}, tmp_path / "x.ckpt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"x\.ckpt' is damaged or from another version: .*size"):
        coca_lit.load_model(tmp_path / "x.ckpt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


# Shards


FORGED_SHARDS = {
    "a place far away": ("state_dict.net.w", [[10**12, 0]], "parts of state_dict.net.w are missing"),
    "no place": ("state_dict.net.w", "nowhere", "is not a whole checkpoint"),
    "another name": ("optimizer_states.x.y.z", [[0, 0]], "it holds 'optimizer_states.x.y.z'"),
}


@pytest.mark.parametrize("case", FORGED_SHARDS)
def test_a_sharded_checkpoint_with_forged_headers(tmp_path, case):
    name, offsets, said = FORGED_SHARDS[case]
    places = json.dumps({name: {"saved_offsets": offsets[0]}} if isinstance(offsets, list) else offsets)
    save_file({name: torch.zeros(2, 2)}, tmp_path / "shard.safetensors", {"DCP_SHARDING_INFO": places})
    torch.save({MODEL_KEY: {}}, tmp_path / sharded.REST)
    written = {"shard.safetensors": sharded.facts(tmp_path / "shard.safetensors")}
    (tmp_path / sharded.SHARDS).write_bytes(sharded.manifest(written))
    with pytest.raises(CheckpointError, match=said):
        coca_lit.load_model(tmp_path)


def test_a_sharded_checkpoint_that_holds_code(tmp_path, target):
    torch.save({MODEL_KEY: Evil(target)}, tmp_path / sharded.REST)
    (tmp_path / sharded.SHARDS).write_bytes(sharded.manifest({}))
    with pytest.raises(ValueError, match="it holds code"):
        coca_lit.load_model(tmp_path)
    with pytest.raises(CheckpointError, match="it holds code"):
        inspect(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize("scheme", ["pipe:touch {0}", "PIPE:touch {0}", "ssh://host/{0}", "file:/x/../{0}"])
def test_url_that_is_a_command(target, scheme):
    with pytest.raises(DataError, match=r"not from '[A-Za-z]+:'"):
        LAIONDataModule(shards=scheme.format(target), epoch_samples=8, tokenizer=TOKENIZER, batch_size=4).prepare_data()


def test_members_that_hold_code(tmp_path, target):
    code = pickle.dumps(Evil(target))
    names = ("evil.pyd", "evil.pickle", "evil.pkl", "evil.pth", "evil.PTH")
    keys, bad, _ = train_on(write_tar(tmp_path / "x.tar", dict.fromkeys(names, code) | good()))
    assert keys == {f"good{i}" for i in range(8)}
    assert {(found.key, found.reason) for found in bad} == {(name, "code in a shard") for name in names}


def test_images_that_hold_code(tmp_path, target):
    files = {"evil.jpg": pickle.dumps(Evil(target)), "evil.txt": b"a dog"} | good()
    keys, bad, _ = train_on(write_tar(tmp_path / "x.tar", files))
    assert "evil" not in keys
    assert bad[0].reason == "unreadable image"


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.txt", "/evil.jpg"])
def test_members_that_lead_out_of_the_shard(tmp_path, name):
    before = sorted(tmp_path.iterdir())
    path = write_tar(tmp_path / "x.tar", good() | {name: jpeg()})
    keys, bad, _ = train_on(path, batches=5)
    assert all(key.startswith("good") for key in keys)
    assert "leads out of the shard" in bad[0].detail
    assert sorted(tmp_path.iterdir()) == [*before, path]


def tar_bomb(path: Path, kind: bytes) -> Path:
    """A good start, and then a member (or header) of 4 GB of zeros in a file of a few kB."""
    info = tarfile.TarInfo("bomb.jpg")
    info.size, info.type = 4 * 2**30, kind
    start = io.BytesIO()
    with tarfile.open(fileobj=start, mode="w") as tar:
        for name, data in good().items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    whole = start.getvalue().rstrip(b"\0")
    whole += bytes(-len(whole) % 512) + info.tobuf(tarfile.GNU_FORMAT) + bytes(10 * 2**20)
    path.write_bytes(gzip.compress(whole, 1) if path.suffix == ".gz" else whole)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"member": "../a.cls"}, "the member '../a.cls' leads out of the shard"),
        ({"label": b"7"}, "must be a whole number below 1, got '7'"),
        ({"label": b"9" * 5000}, "must be a whole number below 1, got '999"),
        ({"shards": "9" * 5000}, "number of shards .* must be a whole number below"),
        ({"shards": "-1"}, "must be a whole number below .*, got '-1'"),
        ({"member": "a.pickle", "label": pickle.dumps(0)}, "sample a lacks its image or its .cls"),
    ],
)
def test_data_sets_of_evaluations(tmp_path, change, said):
    assert len(classified_shards(benchmark_set(tmp_path / "good")).records) == 1
    with pytest.raises(DataError, match=said):
        classified_shards(benchmark_set(tmp_path / "bad", **change))


def test_data_sets_at_urls_that_are_commands(target):
    for root in (f"pipe:touch {target}", f"file://{target}", f"hf://datasets/a/b@x;touch {target}"):
        with pytest.raises(DataError, match=r"not found|neither a folder nor a data set"):
            classified_shards(root)


@pytest.mark.parametrize(
    ("kind", "limit"),
    [(tarfile.REGTYPE, MAX_MEMBER), (tarfile.GNUTYPE_LONGNAME, MAX_HEADER), (tarfile.XHDTYPE, MAX_HEADER)],
)
@pytest.mark.parametrize("name", ["bomb.tar", "bomb.tar.gz"])
def test_members_and_headers_that_claim_gigabytes(tmp_path, name, kind, limit):
    keys, bad, _ = train_on(tar_bomb(tmp_path / name, kind))
    assert keys <= {f"good{i}" for i in range(8)}
    assert f"more than {limit:,}" in bad[0].detail


@pytest.mark.parametrize("content", [b"1" * 16_000, b"1" * 10**6, b"2 " * 500_000 + b"="])
def test_headers_that_cost_time_and_memory_by_the_square_of_their_length(tmp_path, content):
    info = tarfile.TarInfo("pax")
    info.size, info.type = len(content), tarfile.XHDTYPE
    path = write_tar(tmp_path / "x.tar", good())
    header = info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)
    path.write_bytes(header + path.read_bytes())
    bad = BadSamples(1.0)
    assert not list(read_shard(Shard(str(path)), ["txt"], bad))
    assert "a header" in bad.found[0].detail


def test_a_compressed_shard_does_not_grow_without_bound(tmp_path):
    info = tarfile.TarInfo("zeros.bin")
    info.size = 100 * 2**20
    content = info.tobuf() + bytes(info.size + 1024)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(content, 1))
    bad = BadSamples(1.0)
    assert not list(read_shard(Shard(str(path)), ["txt"], bad))
    assert bad.found[0].detail == "decompressed it has more than 67,108,864 bytes, 50 times its size"
    path.with_suffix(".xz").touch()
    list(read_shard(Shard(str(path.with_suffix(".xz"))), ["txt"], bad))
    assert "xz is not read" in bad.found[1].detail


BOTH = pytest.mark.parametrize("indexed", [True, False])


@BOTH
def test_names_that_are_not_utf8(tmp_path, indexed):
    """In a shard whose own name is none: the same keys in streams and indexes, and a log that any file takes."""
    names = ("caf\udce9", "line\nbreak", "\x1b[2J", "fine é")
    files = {f"{name}.{end}": data for name in names for end, data in (("jpg", jpeg()), ("txt", b"a dog"))}
    files |= {"broken\udcff.jpg": b"junk", "broken\udcff.txt": b"a dog"}
    write_tar(tmp_path / "shard\udcff.tar", files | good())
    keys, bad, _ = train_on(tmp_path, batches=6, indexed=indexed)
    assert keys == {"caf\\xe9", "line\\x0abreak", "\\x1b[2J", "fine é", *(f"good{i}" for i in range(8))}
    assert {(found.shard, found.key) for found in bad} == {(f"{tmp_path}/shard\\xff.tar", "broken\\xff")}
    log = BadSampleLog(tmp_path)
    for _ in range(2):  # also of a run that resumes
        log.on_train_start(None, None)
        log.on_train_batch_end(None, None, None, SimpleNamespace(bad=bad), 0)
        log.on_train_end(None, None)
    assert len((tmp_path / "bad_samples" / "rank0.csv").read_text().splitlines()) == 1
    assert "shard\\xff.tar,unreadable image,1" in (tmp_path / "bad_samples" / "shards.csv").read_text()


@BOTH
def test_two_members_of_the_same_name_cost_their_sample_alone(tmp_path, indexed):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in [("twice.jpg", jpeg()), ("twice.txt", b"a"), ("twice.JPG", jpeg(9)), *good().items()]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    keys, bad, _ = train_on(path, batches=4, indexed=indexed)
    assert keys == {f"good{i}" for i in range(8)}
    assert {found[1:] for found in bad} == {("twice", "two members of the same name", "twice.JPG")}
    assert [sample.key for sample in scan_shard(path)[0]] == [f"good{i}" for i in range(8)]


@BOTH
def test_images_of_more_bytes_than_a_photo_has(tmp_path, indexed):
    path = write_tar(tmp_path / "x.tar", {"big.jpg": jpeg() + bytes(MAX_IMAGE), "big.txt": b"a dog"} | good())
    keys, bad, _ = train_on(path, batches=4, indexed=indexed)
    assert keys == {f"good{i}" for i in range(8)}
    assert {found[1:3] for found in bad} == {("big", "unreadable image")}
    assert bad[0].detail == f"big in {path} has 33,554,433 bytes, more than the 33,554,432 that are decoded"


@BOTH
def test_torn_shards_are_no_small_loss(tmp_path, indexed):
    image = jpeg()
    files = {f"{i}.{end}": data for i in range(600) for end, data in (("jpg", image), ("txt", b"a dog"))}
    for name in "abc":  # 4 % of each are left
        content = write_tar(tmp_path / f"{name}.tar", files).read_bytes()
        (tmp_path / f"{name}.tar").write_bytes(content[: len(content) // 25])
    with pytest.raises(DataError, match=r"too many torn or empty shards, .*max_bad_fraction=0\.05 .*: 3 of 3 shards"):
        train_on(tmp_path, batches=20, indexed=indexed, max_bad_fraction=0.05)


def test_text_bomb(tmp_path):
    files = {"bomb.jpg": jpeg(), "bomb.txt": b"a dog " * 1_000_000} | good()
    keys, bad, _ = train_on(write_tar(tmp_path / "x.tar", files))
    assert "bomb" not in keys
    assert bad[0][1:3] == ("bomb", "missing caption")


def test_json_bomb(tmp_path):
    bomb = {"bomb.jpg": jpeg(), "bomb.json": b'{"caption": ' + b"[" * 100_000}
    path = write_tar(tmp_path / "x.tar", bomb | good("json", b'{"caption": "a dog"}'))
    data = LAIONDataModule(
        shards=str(path),
        epoch_samples=8,
        tokenizer=TOKENIZER,
        batch_size=4,
        image_size=16,
        caption_keys="caption",
        max_bad_fraction=0.5,
    )
    assert "bomb" not in {key for batch in data.train_dataloader() for key in batch.keys}


def test_captions_that_hold_special_tokens(tmp_path):
    caption = b"<start_of_text>a dog<end_of_text> <|endoftext|> a cat</s>"
    *_, (batch, *_) = train_on(write_tar(tmp_path / "x.tar", good(text=caption)))
    for tokens, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
        real = tokens[:length]
        assert (real[0], real[-1]) == (TOKENIZER.sot_id, TOKENIZER.eot_id)
        assert not {TOKENIZER.sot_id, TOKENIZER.eot_id} & set(real[1:-1])
        assert "end_of_text" in TOKENIZER.decode(real).replace(" ", "")


# Images, as the web page and every data set decode them


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (SVG, "x is not a readable image: it is none of JPEG, PNG, WEBP, BMP, GIF"),
        (b"", "x is not a readable image: it is none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x is not a readable image: it is none of"),
        (png_header(0, 9), "x is not a readable image"),
        (b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b";", "x (is not a readable image|has 0 x 0 pixels)"),
        (png_header(60_000, 60_000), "x is not a readable image: Image size .* could be decompression bomb"),
        (png_header(8_000, 5_001), "x has 8000 x 5001 pixels, more than the 40,000,000 that are decoded"),
        (png_header(1, 30_000), "x has 1 x 30000 pixels, an aspect ratio above 100"),
        (jpeg()[:300], "x is not a readable image"),
        (jpeg() + bytes(MAX_IMAGE), "x has 33,55.,... bytes, more than the 33,554,432 that are decoded"),
    ],
    ids=["svg", "empty", "postscript", "no width", "no pixels", "bomb", "large", "line", "cut", "long"],
)
def test_no_picture(content, said):
    with pytest.raises(DataError, match=f"^{said}"):
        decode_image(io.BytesIO(content), "x")


# Files that are none, and JSON that is not what it should be


def _captions(folder: Path) -> object:
    return open_writer(str(folder / "out.jsonl"), [], {})


def here(function, items, shared):
    """Works through the items in this process."""
    return (function(item, shared) for item in items)


READERS: dict[str, Callable[[Path], object]] = {
    MANIFEST: lambda folder: find_shards(str(folder)),
    CHECK_JOURNAL: lambda folder: [*check_shards([write_tar(folder / "x.tar", good())], "txt", here)],
    JOURNAL: lambda folder: [*prepare(plan_shards([]), folder, here)],
    "captions.json": lambda folder: coco_folder_records(folder),
    "results.json": lambda folder: read_run(folder),
    "out.jsonl": _captions,
    "out.jsonl.settings.json": _captions,
    "x.safetensors": lambda folder: ImageIndex.load(folder / "x.safetensors", None),
    "x.jpg": lambda folder: decode_image(folder / "x.jpg", "x.jpg"),
    "x.png": lambda folder: load_pixels(ImageFile(folder / "x.png")),
    "texts.jsonl": lambda folder: read_texts(str(folder / "texts.jsonl")),
    "kept.parquet": lambda folder: read_selection(folder / "kept.parquet"),
    "x.scores.parquet": lambda folder: read_about(folder / "x.scores.parquet"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_fifo_does_not_block(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=re.escape(name)):
        READERS[name](tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(40) + b"PAR1", b"PAR1" + b"\xff" * 40 + b"PAR1"])
@pytest.mark.parametrize("name", ["kept.parquet", "x.scores.parquet"])
def test_what_is_no_parquet(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^[^\n]*{re.escape(name)} is not a readable parquet file: [^\n]+$"):
        READERS[name](tmp_path)
    with pytest.raises(DataError, match=r"^[^\n]+$"):
        filter_scores([tmp_path / name], tmp_path / "new.parquet")


def test_parquet_of_other_columns(tmp_path):
    parquet.write_table(pa.table({"shard": [1], "key": [2]}), tmp_path / "kept.parquet")
    with pytest.raises(DataError, match="is not a selection of samples, which has the texts shard and key as columns"):
        read_selection(tmp_path / "kept.parquet")
    (tmp_path / "kept.parquet").rename(tmp_path / "x.scores.parquet")
    with pytest.raises(DataError, match="exists and coca-data score did not write it: choose another output, or"):
        read_about(tmp_path / "x.scores.parquet")
    with pytest.raises(DataError, match=r"^[^\n]+$"):
        filter_scores([tmp_path / "x.scores.parquet"], tmp_path / "new.parquet", "similarity > 1")


def test_a_selection_of_a_few_bytes_that_claims_gigabytes(tmp_path):
    path, rows = tmp_path / "kept.parquet", 4_000_000
    table = pa.table({"shard": _repeated("a.tar", rows), "key": _repeated("x" * 10_000, rows)})  # 40 GB as texts
    parquet.write_table(table, path, row_group_size=rows)
    assert path.stat().st_size < 20_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_selection(path)
    assert (found.counts, found.keys("a.tar")) == ({"a.tar": rows}, {"x" * 10_000})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # kB


def test_a_row_group_of_too_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("coca_lit.reading.MAX_GROUP", 10)
    parquet.write_table(pa.table({"shard": ["a"] * 11, "key": ["b"] * 11}), tmp_path / "kept.parquet")
    with pytest.raises(DataError, match="has row groups of more than 10 rows or 1,073,741,824 bytes: write it with"):
        read_selection(tmp_path / "kept.parquet")


def _repeated(text: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), [text])


def test_a_fifo_is_no_shard_and_no_index(tmp_path):
    path = write_tar(tmp_path / "x.tar", good())
    os.mkfifo(tmp_path / ".x.tar.index")
    assert len(tar_indexes([Shard(str(path))], tmp_path)[0]) == 8
    path.unlink()
    os.mkfifo(path)
    bad = BadSamples(1.0)
    assert not list(read_shard(Shard(str(path)), ["txt"], bad))
    assert "not a regular file" in bad.found[0].detail


ODD = {
    "list": "[]",
    "number": "7",
    "deep": "[" * 100_000,
    "digits": "1" * 10_000,
    "surrogate": '"\\ud800"',
    "rows": '{"shards": [[1]], "images": [7], "annotations": [[]], "a": {}}',
    "numbers": '{"shards": [{"name": "x.tar", "samples": 1e999, "bytes": 1, "sha256": ""}], "images": 1e999, "a": "b"}',
    "huge": '{"shards": [{"name": "x.tar", "samples": 1' + "0" * 300 + ', "bytes": 1, "sha256": ""}], "a": null}',
    "torn": '{"a": ',
    "not unicode": "\udcff",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
@pytest.mark.parametrize("name", [MANIFEST, "captions.json", "results.json", "out.jsonl.settings.json"])
def test_odd_json_is_one_sentence(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"^[^\n]+$") as error:
        READERS[name](tmp_path)
    assert name in str(error.value) or "a=" in str(error.value)


# Secrets


@pytest.mark.slow
def test_no_secret_in_what_a_run_prints_and_writes(tmp_path, monkeypatch):
    secrets = {"WANDB_API_KEY": "from-environment-1", "HF_TOKEN": "from-environment-2"}
    arguments = (
        *("trainer=smoke", "name=x", "++logger.csv.token=typed-3", "++model.net.note=${oc.env:HF_TOKEN}"),
        "++logger.csv.deep={api_key:typed-4,password:${oc.env:WANDB_API_KEY}}",
        "+data.text=https://me:typed-5@host/x",
    )
    printed = train_py(*arguments, "--cfg", "job", "--resolve", cwd=tmp_path, **secrets)
    shown = yaml.safe_load(printed.stdout)
    assert (shown["model"]["net"]["name"], shown["model"]["net"]["note"]) == ("coca_tiny", "<hidden>")
    hidden = [shown["logger"]["csv"]["token"], *shown["logger"]["csv"]["deep"].values()]
    assert hidden == ["<hidden>"] * 3
    stopped = train_py(*arguments, cwd=tmp_path, **secrets)
    (said,) = stopped.stderr.splitlines()
    assert said.startswith("error: model: CoCa has no argument 'note'")
    for name, value in secrets.items():  # what a run that starts writes
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    start_run_folder(compose(*arguments, f"output_dir={tmp_path}/outputs/x"))
    written = {path.name: path.read_text() for path in (tmp_path / "outputs").rglob("*") if path.is_file()}
    assert {"config.yaml", "environment.json"} <= set(written)
    assert "token=<hidden>" in json.loads(written["environment.json"])["command"]
    assert yaml.safe_load(written["config.yaml"])["model"]["net"]["note"] == "${oc.env:HF_TOKEN}"
    everything = "".join([printed.stdout, printed.stderr, stopped.stdout, stopped.stderr, *written.values()])
    assert not re.search(r"from-environment|typed-", everything)
    wrong = train_py("++logger.csv.token=typed-6,typed-7", "name=x", cwd=tmp_path)  # which the message repeats
    assert wrong.stderr.startswith("error: ")
    assert "typed-" not in wrong.stderr


@pytest.mark.slow
def test_no_secret_of_a_sweep(tmp_path):
    """In Hydra's record, the log lines of its launcher, our records, and names of folders."""
    words = ("-m", "seed=1,2", "++logger.csv.token=typed-1", "model.net.name=nothing", "hydra.sweep.subdir=${seed}")
    done = train_py(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert "the first error: model: unknown model 'nothing'" in done.stderr
    assert "#1 : seed=2 ++logger.csv.token=<hidden>" in done.stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert {"multirun.yaml", "job.json", "error.txt", "results.csv"} <= {path.name for path in files}
    everything = "".join([done.stdout, done.stderr, *map(str, files), *(path.read_text() for path in files)])
    assert "typed-1" not in everything


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *(
            (f"{name}=x1", f"{name}=<hidden>")
            for name in ("api_key", "aws_secret_key", "api-key", "accessToken", "auth")
        ),
        *((f"{name}=x1", f"{name}=<hidden>") for name in ("passphrase", "GITHUB_PAT", "a.b.password", "clientSecret")),
        *(
            (f"{name}=x1", f"{name}=<hidden>")
            for name in (
                "PGPASSWORD",
                "db_passwd",
                "passwd",
                "db_pwd",
                "pwd",
                "DB_PASSWORD",
                "MYSQL_PWD",
                "credentials",
            )
        ),
        *((f"{name}=x1", f"{name}=<hidden>") for name in ("credential", "private_key", "signing-key", "authorization")),
        *(
            (f"{name}=x1", f"{name}=<hidden>")
            for name in ("password", "secret", "token", "encryption_key", "accessKey")
        ),
        *(
            (text, text)
            for text in ("tokenizer=x", "caption_tokens: 20", "author=me", "compat=1", "no_repeat_ngram: 3")
        ),
        ("token=${oc.env:HF_TOKEN}", "token=${oc.env:HF_TOKEN}"),
        ("s3://user:pass@host/x", "s3://user:<hidden>@host/x"),
        ('{"api_key": "a, b"}', '{"api_key": "<hidden>"}'),
        ("token: 'a b', c", "token: '<hidden>', c"),
        ("Authorization: Bearer abc", "Authorization: <hidden>"),
        ("https://host/x?token=abc&y=1", "https://host/x?token=<hidden>&y=1"),
        ("['x.api_key=a', 'seed=1']", "['x.api_key=<hidden>', 'seed=1']"),
    ],
)
def test_names_of_secrets(text, shown):
    assert redact(text) == shown


def test_the_shell_names_its_folder_like_a_password(monkeypatch):
    monkeypatch.setenv("PWD", "/home/me/work")
    monkeypatch.setenv("OLDPWD", "/home/me/data")
    monkeypatch.setenv("MYSQL_PWD", "hunter2")
    assert redact("/home/me/work/a /home/me/data/b hunter2") == "/home/me/work/a /home/me/data/b <hidden>"


def test_everything_under_a_secret_name_is_one():
    config = {"auth": {"user": "me", "pin": 12, "key": "${oc.env:KEY}"}, "urls": ["s3://me:pw@host"], "token": None}
    masked = {"user": "<hidden>", "pin": "<hidden>", "key": "${oc.env:KEY}"}
    assert mask(config) == {"auth": masked, "urls": ["s3://me:<hidden>@host"], "token": None}

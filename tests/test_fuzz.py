"""Readers of files that may come from strangers, on files that Hypothesis damages and forges: they return, or raise one
sentence; nothing crashes, hangs or takes memory without bound.

`COCA_FUZZ=20000 pytest tests/test_fuzz.py` tries that many files for each reader, others at every call.
"""

import copy
import gzip
import io
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_shards import jpeg, members, write_shards

import coca_lit
from coca_lit.callbacks.bad_sample_log import read_bad_samples
from coca_lit.data.bad_samples import BadSampleError, BadSamples
from coca_lit.data.curate.choose import filter_scores
from coca_lit.data.curate.scores import read_about, write_scores
from coca_lit.data.datasets.annotations import read_karpathy, read_references, read_results
from coca_lit.data.datasets.choice import (
    SUGARCREPE,
    aro_order_records,
    aro_records,
    sugarcrepe_records,
    winoground_records,
)
from coca_lit.data.datasets.classification import _read_classes
from coca_lit.data.datasets.coco import coco_folder_records
from coca_lit.data.datasets.long_captions import docci_records, sharegpt4v_records
from coca_lit.data.datasets.vqa import vqa_records
from coca_lit.data.prepare.check import JOURNAL as CHECK_JOURNAL
from coca_lit.data.prepare.check import _journals, check_shards
from coca_lit.data.prepare.write import JOURNAL, _open_journal
from coca_lit.data.shards.indexed import load_index, make_index
from coca_lit.data.shards.listing import MANIFEST, Shard, read_manifest, write_manifest
from coca_lit.data.shards.reader import read_shard, sample_of
from coca_lit.data.shards.selection import read_selection
from coca_lit.data.text_batches import read_texts
from coca_lit.data.transforms import decode_pixels
from coca_lit.errors import UserError
from coca_lit.evals.chair import Chair
from coca_lit.inference.inputs import Files, Source
from coca_lit.inference.outputs import open_writer
from coca_lit.inference.search import ImageIndex
from coca_lit.inference.shards import scan_shard
from coca_lit.models import create_model
from coca_lit.report.runs import read_run
from coca_lit.runs.checkpoint_io import inspect
from coca_lit.weights.load import save_model

COUNT = int(os.environ.get("COCA_FUZZ", 0))
MEMORY = 600 * 2**20  # bytes by which the peak may grow, while any one file has a few kB
SECONDS = 20  # for one file
fuzz = settings(
    max_examples=COUNT or 50,
    derandomize=not COUNT,
    deadline=None,
    database=None,
    suppress_health_check=[*HealthCheck],
)

# What is done to a file


def _overwrite(content: bytes, at: int, payload: bytes) -> bytes:
    return content[:at] + payload + content[at + len(payload) :]


EDITS: list[Callable[[bytes, int, bytes], bytes]] = [
    _overwrite,
    lambda content, at, payload: content[:at] + payload + content[at:],
    lambda content, at, payload: content[:at] + content[at + len(payload) :],
    lambda content, at, payload: content[:at],
    lambda content, at, payload: content[:at] + content[at // 2 :],
    lambda content, at, payload: _overwrite(content, at // 512 * 512, content[:512]),  # another header of a tar
]
PAYLOADS = st.one_of(
    st.binary(min_size=1, max_size=16),
    st.sampled_from(
        [b"\0" * 8, b"\xff" * 8, b"\x80" + b"\0" * 7 + b"\xff" * 4, b"9" * 40, b"S", b"x", b"L", b"[" * 3000]
    ),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    for _ in range(draw(st.integers(1, 4))):
        edit, at = draw(st.sampled_from(EDITS)), draw(st.integers(0, max(0, len(content) - 1)))
        content = edit(content, at, draw(PAYLOADS))
    return content


ODD = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 2**63, -(2**70), 10**400, 1e308 * 10, 0.5, "", "\ud800", "\udcff.jpg", "\0", "../x"]
    ),
    st.sampled_from([[], {}, [[]], [None], {"": None}, "x" * 5000, [1] * 50]).map(copy.deepcopy),
    st.text(max_size=4),
    st.integers(),
)


@st.composite
def forged(draw: st.DrawFn, document: Any) -> bytes:
    """A JSON document with odd values in some places, missing ones in others, and sometimes torn."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        document = draw(_changed(document))
    text = json.dumps(document).encode()
    if draw(st.integers(0, 9)) == 0:
        deep = draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.sampled_from([10, 900, 200_000]))
        text = draw(st.sampled_from([deep, text.replace(b"1", b"1" * 5000, 1), deep + text, b"\xef\xbb\xbf" + text]))
    return draw(damaged(text)) if draw(st.integers(0, 4)) == 0 else text


@st.composite
def _changed(draw: st.DrawFn, node: Any) -> Any:
    if isinstance(node, dict | list) and node and draw(st.integers(0, 4)):
        key = draw(st.sampled_from([*node] if isinstance(node, dict) else [*range(len(node))]))
        if draw(st.integers(0, 5)) == 0:
            node.pop(key)
        else:
            node[key] = draw(_changed(node[key]))
        return node
    return draw(ODD)


@contextmanager
def bounded() -> Iterator[None]:
    """Passes the errors that a user is shown as one sentence; anything else, and a reader that hangs, fails."""

    def overdue(number: int, frame: object) -> None:
        raise AssertionError(f"it took more than {SECONDS} s")

    peak = _peak()
    before = signal.signal(signal.SIGALRM, overdue)
    signal.alarm(SECONDS)
    try:
        yield
    except UserError as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError("more than one sentence") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert _peak() - peak < MEMORY


def _peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# Shards


def _tars() -> list[bytes]:
    """In the formats of GNU and POSIX, with names that need a header of their own and names that are not UTF-8."""
    import tarfile

    made = []
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            for key in ("a", "caf\udce9", "long" * 40):
                for name, data in members(key.encode(errors="surrogateescape").decode(errors="replace")).items():
                    info = tarfile.TarInfo(key + name[name.rindex(".") :])
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        made.append(buffer.getvalue())
    return made


@fuzz
@given(st.data())
def test_shards(folder, data):
    content = data.draw(st.sampled_from(_tars()).flatmap(damaged))
    packed = data.draw(st.booleans())
    path = folder / f"x.tar{'.gz' if packed else ''}"
    path.write_bytes(data.draw(damaged(gzip.compress(content, 1))) if packed and len(content) % 2 else content)
    if packed and not len(content) % 2:
        path.write_bytes(gzip.compress(content, 1))
    with bounded():
        bad = BadSamples(1.0)
        samples = list(read_shard(Shard(str(path)), ["txt", "caption"], bad))
        for found in (*samples, *bad.found):
            assert found.key.isprintable()
        assert bad.seen >= len(samples)
    if packed:
        return
    with bounded():
        index, streamed = make_index(Shard(str(path)), folder), []
        for i in range(len(index)):
            fields = index.read(i)
            with suppress(BadSampleError):
                streamed.append(sample_of(fields, ["txt", "caption"], str(path)))
        assert streamed == samples
    with bounded():
        scan_shard(path)


@fuzz
@given(st.data())
def test_indexes(folder, data):
    (path,) = write_shards(folder, 1, 3)
    os.utime(path, ns=(1, 1))
    shard, index = Shard(str(path)), folder / ".00000.tar.index"
    index.unlink(missing_ok=True)
    make_index(shard, folder)
    index.write_bytes(data.draw(damaged(index.read_bytes())))
    with bounded():
        if found := load_index(shard, folder):
            for i in range(len(found)):
                assert found.read(i)["__key__"] == found.key(i)


# What programs write


@fuzz
@given(st.data())
def test_manifests(folder, data):
    entries = {f"{i}.tar": {"name": f"{i}.tar", "samples": i, "bytes": 2 * i, "sha256": "0" * 64} for i in range(3)}
    document = {"samples": 3, "bytes": 6, "shards": [*entries.values()]}
    (folder / MANIFEST).write_bytes(data.draw(forged(document)))
    with bounded():
        write_manifest(folder / "again", read_manifest(folder))


@fuzz
@given(st.data())
def test_journals(folder, data):
    (path,) = write_shards(folder, 1, 1)
    entry = [1, path.stat().st_size, "0" * 64]
    report = [str(path), path.stat().st_mtime_ns, entry, {"missing caption": 1}, ["a what"], ""]
    lines = [data.draw(forged(["txt", report])) for _ in range(2)]
    (folder / CHECK_JOURNAL).write_bytes(b"\n".join(lines) + b"\n")
    with bounded():
        for known in _journals({folder}, "txt").values():
            assert known.bad_samples == sum(known.bad.values())
        reports = check_shards([path], "txt", lambda check, paths, key: (check(path, key) for path in paths))
        assert len([*reports]) == 1
    output = folder / "output"
    output.mkdir(exist_ok=True)
    written = ["00000.tar", [1, 2, "0" * 64], {"missing caption": 1}, ["a what"]]
    (output / JOURNAL).write_bytes(b"digest\n" + data.draw(forged(written)) + b"\n")
    with bounded():
        _open_journal(output, "digest")


@fuzz
@given(st.data())
def test_settings_and_captions_of_a_resumed_command(folder, data):
    sources = [Source(f"{i}.jpg", Path(f"{i}.jpg")) for i in range(2)]
    options = {"model": "x", "generate.num_captions": 1}
    for name, key in (("out.jsonl", "path"), ("out.json", "image_id")):
        path = folder / name
        (folder / f"{name}.settings.json").write_text(json.dumps(options))
        rows = [{key: i if key == "image_id" else f"{i}.jpg", "caption": "a dog"} for i in range(2)]
        if key == "path":
            path.write_bytes(b"".join(data.draw(forged(row)) + b"\n" for row in rows))
        else:
            path.write_bytes(data.draw(forged(rows)))
        if data.draw(st.booleans()):
            (folder / f"{name}.settings.json").write_bytes(data.draw(forged(options)))
        with bounded():
            writer = open_writer(str(path), [Files(sources)], options)
            writer.write({source: ["a cat"] for source in sources if not writer.has(source)})
            writer.finish()


@fuzz
@given(st.data())
def test_run_folders(folder, data):
    run = folder / "run"
    (run / "bad_samples").mkdir(parents=True, exist_ok=True)
    (run / "results.json").write_bytes(data.draw(forged({"scenes/CIDEr": 0.5, "scenes/BLEU": 1})))
    (run / "environment.json").write_bytes(data.draw(forged({"command": "x", "seconds": 3})))
    (run / "bad_samples" / "rank0.csv").write_bytes(data.draw(damaged(b"x.tar,key,unreadable image,what\n" * 3)))
    with bounded():
        read_bad_samples(run / "bad_samples")
    with bounded():
        read_run(run)


# Annotations

KARPATHY = {
    "images": [
        {"filename": f"{i}.jpg", "split": split, "imgid": i, "cocoid": 10 + i, "sentences": [{"raw": "a dog"}]}
        for i, split in enumerate(["train", "restval", "val"])
    ]
}
COCO = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "domain": "near-domain"} for i in range(2)],
    "annotations": [{"image_id": i, "caption": "a dog", "id": i} for i in range(2)],
}
RESULTS = [{"image_id": i, "caption": "a dog"} for i in range(3)]
QUESTIONS = {"data_subtype": "val2014", "questions": [{"image_id": 1, "question": "what?", "question_id": 10}]}
ANSWERS = {
    "annotations": [
        {
            "question_id": 10,
            "multiple_choice_answer": "dog",
            "answers": [{"answer": "dog"}, {"answer": "cat"}],
            "answer_type": "yes/no",
        }
    ]
}


@fuzz
@given(st.data())
def test_annotations(folder, data):
    (folder / "images").mkdir(exist_ok=True)
    for i in range(2):
        (folder / "images" / f"{i}.jpg").touch()
    path = folder / "captions.json"
    for document, reader in (
        (KARPATHY, lambda: read_karpathy(path, "train")),
        (COCO, lambda: coco_folder_records(folder)),
        (data.draw(st.sampled_from([KARPATHY, COCO])), lambda: read_references(path, "val")),
        (RESULTS, lambda: read_results(path)),
        ({"classes": {"a": "dog"}, "templates": ["a photo of a {}."]}, lambda: _read_classes(path)),
        ({"text": "a dog"}, lambda: read_texts(str(folder / "texts.jsonl"))),
    ):
        content = data.draw(forged(document))
        path.write_bytes(content)
        (folder / "texts.jsonl").write_bytes(content)
        with bounded():
            reader()
    for kind, document in (("OpenEnded_mscoco_val2014_questions", QUESTIONS), ("mscoco_val2014_annotations", ANSWERS)):
        (folder / f"v2_{kind}.json").write_bytes(data.draw(forged(document)))
    (folder / "images" / "COCO_val2014_000000000001.jpg").touch()
    with bounded():
        for record in vqa_records(folder, "val"):
            hash(record.id)
    packed = folder / "captions.json.gz"
    packed.write_bytes(data.draw(damaged(gzip.compress(json.dumps(COCO).encode()))))
    with bounded():
        coco_folder_records(folder, annotations=packed.name)


BOXED = {"image_path": "0.jpg", "bbox_x": 0, "bbox_y": 0, "bbox_w": 9, "bbox_h": 9}
RELATIONS = [{**BOXED, "true_caption": "a", "false_caption": "b", "relation_name": "on", "attributes": ["red", "old"]}]
PAIR = {"id": 0, "image_0": "0", "image_1": "1", "caption_0": "a dog", "caption_1": "dog a"}
ORDERED = [{"image": "images/0.jpg", "caption": ["a black dog", "a cat"]}]
TALKS = [{"image": f"images/{i}.jpg", "conversations": [{"value": "?"}, {"value": "a dog"}]} for i in range(2)]
INSTANCES = {"categories": [{"id": 1, "name": "dog"}], "annotations": [{"image_id": 0, "category_id": 1}]}


@fuzz
@given(st.data())
def test_annotations_of_evaluations(folder, data):
    (folder / "images").mkdir(exist_ok=True)
    for name in ("0.jpg", "1.jpg", "0.png", "1.png"):
        (folder / "images" / name).write_bytes(jpeg(3))
    for kind in SUGARCREPE:
        (folder / f"{kind}.json").write_text("{}")
    crepe = {str(i): {"filename": f"{i}.jpg", "caption": "a", "negative_caption": "b"} for i in range(2)}
    docci = {"example_id": "0", "image_file": "0.jpg", "description": "a dog", "split": "test"}
    (folder / "synonyms.txt").write_bytes(data.draw(damaged(b"dog, puppy\ncat\n")))
    for name, document, reader in (
        ("add_obj.json", crepe, lambda: sugarcrepe_records(folder, folder / "images")),
        ("examples.jsonl", PAIR, lambda: winoground_records(folder)),
        ("visual_genome_relation.json", RELATIONS, lambda: aro_records(folder, "relation")),
        ("visual_genome_attribution.json", RELATIONS, lambda: aro_records(folder, "attribution")),
        ("coco_karpathy_test.json", ORDERED, lambda: aro_order_records(folder, "coco", tag=lambda x: [(x, "NN")])),
        ("docci_descriptions.jsonlines", docci, lambda: docci_records(folder)),
        ("list.json", TALKS, lambda: sharegpt4v_records(folder, "list.json")),
        ("instances.json", INSTANCES, lambda: [Chair(folder / "synonyms.txt", folder / "instances.json")]),
    ):
        (folder / name).write_bytes(data.draw(forged(document)))
        with bounded():
            for record in reader():
                if name.startswith("visual_genome"):
                    record.image()


# Scores and selections of samples


@pytest.fixture(scope="module")
def chosen(folder) -> dict[str, bytes]:
    columns = {"key": ["1", "2"], "similarity": [0.1, 0.2], "phash": [1, 2]}
    about = {"shard": [1, 1], "bad": {}, "examples": [], "model": "m"}
    write_scores(folder / "a.scores.parquet", "a.tar", columns, about)
    filter_scores([folder / "a.scores.parquet"], folder / "kept.parquet")
    return {name: (folder / name).read_bytes() for name in ("a.scores.parquet", "kept.parquet")}


@settings(fuzz, max_examples=COUNT or 25)  # a database is opened for each
@given(st.data())
def test_scores_and_selections(folder, chosen, data):
    scores, kept = folder / "forged.scores.parquet", folder / "forged.parquet"
    scores.write_bytes(data.draw(damaged(chosen["a.scores.parquet"])))
    kept.write_bytes(data.draw(damaged(chosen["kept.parquet"])))
    with bounded():
        read_about(scores)
    with bounded():
        found = read_selection(kept)
        for shard in found.counts:
            found.keys(shard)
    with bounded():
        filter_scores([scores], folder / "new.parquet", selection=kept)


# Images, checkpoints and search indexes


def _pictures() -> list[bytes]:
    picture = Image.frombytes("RGB", (20, 18), os.urandom(20 * 18 * 3))
    made = [jpeg(3)]
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        made.append(buffer.getvalue())
    return made


PICTURES = _pictures()


@fuzz
@given(st.sampled_from(PICTURES).flatmap(damaged))
def test_images(content):
    with bounded():
        assert decode_pixels(content, "x").shape[0] == 3


@pytest.fixture(scope="module")
def saved(folder) -> tuple[Any, dict[str, bytes]]:
    """A tiny model, and the files that hold it."""
    torch.manual_seed(0)
    model = create_model("coca_tiny").eval()
    save_model(model, folder / "model.safetensors")
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "coca_lit_model": model.config, "epoch": 1}, folder / "model.ckpt")
    (folder / "photos").mkdir()
    for i in range(2):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(folder / "photos" / f"{i}.png")
    index = ImageIndex(model, folder / "photos")
    index.update()
    index.save(folder / "photos.safetensors")
    names = ("model.safetensors", "model.ckpt", "photos.safetensors")
    return model, {name: (folder / name).read_bytes() for name in names}


def damaged_ends(data: st.DataObject, content: bytes) -> bytes:
    """Damage where a file of megabytes has its structure: within its first 4 kB, or its last. Hypothesis keeps what is
    drawn, so that is not the whole file.
    """
    if data.draw(st.booleans()):
        return data.draw(damaged(content[:4096])) + content[4096:]
    return content[:-4096] + data.draw(damaged(content[-4096:]))


@settings(fuzz, max_examples=COUNT or 12)  # a model is built for each that is whole
@given(st.data())
def test_checkpoints(folder, saved, data):
    for name in ("model.safetensors", "model.ckpt"):
        path = folder / f"forged{Path(name).suffix}"
        path.write_bytes(damaged_ends(data, saved[1][name]))
        with bounded(), suppress(ValueError, FileNotFoundError):  # which the commands show as one sentence, too
            coca_lit.load_model(path)
        if name.endswith(".ckpt"):
            with bounded():
                inspect(path)


@fuzz
@given(st.data())
def test_search_indexes(folder, saved, data):
    path = folder / "forged.safetensors"
    path.write_bytes(data.draw(damaged(saved[1]["photos.safetensors"])))
    with bounded():
        index = ImageIndex.load(path, saved[0])
        assert len(index.paths) == len(index.features)
        index.save(folder / "again.safetensors")

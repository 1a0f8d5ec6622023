"""Files that the tools wrote and a stranger has changed: journals, captions, run folders, search indexes."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coca_lit.callbacks.guards import read_bad_samples
from coca_lit.metrics.uncertainty import Conditions, Draws
from coca_lit.models import CoCa, create_model
from coca_lit.runs.results import write_draws
from coca_lit.tools.caption.inputs import Source
from coca_lit.tools.caption.outputs import open_writer
from coca_lit.tools.prepare.check import JOURNAL as CHECK_JOURNAL
from coca_lit.tools.prepare.check import _journals, check_shards
from coca_lit.tools.prepare.write import JOURNAL, _open_journal
from coca_lit.tools.report import page
from coca_lit.tools.search.index import ImageIndex
from helpers.fuzzing import bounded, damaged, forged, fuzz
from helpers.shards import write_shards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(st.data())
def test_forged_journals(folder, data):
    (path,) = write_shards(folder, 1, 1)
    entry = [1, path.stat().st_size, "0" * 64]
    report = [str(path), path.stat().st_mtime_ns, entry, {"missing caption": 1}, ["a what"], ""]
    lines = [data.draw(forged(["txt", report])) for _ in range(2)]
    (folder / CHECK_JOURNAL).write_bytes(b"\n".join(lines) + b"\n")
    with bounded():
        for known in _journals({folder}, "txt").values():
            assert isinstance(sum(known.bad.values()), int)
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
def test_forged_captions_of_a_resumed_command(folder, data):
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
            writer = open_writer(str(path), [sources], options)
            writer.write({source: ["a cat"] for source in sources if not writer.has(source)})
            writer.finish()


PICTURE = "data:image/png;base64,"
FOUND = [{"text": "a dog", "answers": [{"image": PICTURE, "hit": True}]}]
NAMED = [{"image": PICTURE, "answers": [{"text": "a dog", "hit": False}]}]
RUN = {
    "results.json": {"scenes/CIDEr": 0.5, "scenes/BLEU": 1},
    "environment.json": {"command": "x", "experiment": "demo", "seconds": 3, "parameters": {"image encoder": 7}},
    "not_run.json": {"SPICE": "no jars"},
    "config.yaml": {"seed": 1, "data": {"seed": "${seed}"}, "model": {"net": {"name": "coca_tiny"}}},
    "conditions.json": [
        {
            "scores": ["scenes/CIDEr"],
            **Conditions("val", 8, "0" * 16, 8, "1" * 16, {"generate.num_beams": "4"})._asdict(),
        }
    ],
    "samples/a_captions.json": [{"image": PICTURE, "caption": "a", "exact": True, "references": ["a", "b"]}],
    "samples/a_worst.json": [{"image": PICTURE, "question": "b", "caption": "a", "exact": True, "references": ["a"]}],
    "samples/a_retrieval.json": {"text_to_image": FOUND, "image_to_text": NAMED},
    "samples/a_attention.json": [{"image": PICTURE, "words": [{"map": PICTURE, "word": "a"}]}],
    "samples/a_confusion.json": [{"image": PICTURE, "class": "a", "taken_for": "b", "images": 1, "of": 2}],
}


@fuzz
@given(st.data())
def test_forged_run_folders(folder, data):
    """The files that a report reads, one or two of them forged: all in one read, and the page."""
    run = folder / "run"
    for name in ("samples", "bad_samples"):
        (run / name).mkdir(parents=True, exist_ok=True)
    changed = data.draw(
        st.sets(st.sampled_from([*RUN, "metrics.csv", "draws.npz", "rank0.csv"]), min_size=1, max_size=2)
    )
    for name, document in RUN.items():
        content = data.draw(forged(document)) if name in changed else json.dumps(document).encode()
        (run / name).write_bytes(content)
    write_draws(run, {"scenes/CIDEr": Draws(np.linspace(0, 1, 50), 0.5, "images", 0)})
    files = {
        "metrics.csv": b"step,epoch,train/caption_loss\n0,0,3.5\n1,0,2.5\n2,,\n",
        "draws.npz": (run / "draws.npz").read_bytes(),
        "bad_samples/rank0.csv": b"x.tar,key,unreadable image,what\n" * 3,
    }
    for name, content in files.items():
        (run / name).write_bytes(data.draw(damaged(content)) if Path(name).name in changed else content)
    with bounded():
        read_bad_samples(run / "bad_samples")
    with bounded(), mock.patch.object(page, "curves_figures", return_value={}):
        page.write_report(run)


@pytest.fixture(scope="module")
def searched(folder) -> tuple[CoCa, bytes]:
    """A tiny model, and its index of two photos."""
    torch.manual_seed(0)
    model = create_model("coca_tiny").eval()
    (folder / "photos").mkdir()
    for i in range(2):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(folder / "photos" / f"{i}.png")
    index = ImageIndex(model, folder / "photos")
    index.update()
    index.save(folder / "photos.safetensors")
    return model, (folder / "photos.safetensors").read_bytes()


@fuzz
@given(st.data())
def test_forged_search_indexes(folder, searched, data):
    path = folder / "forged.safetensors"
    path.write_bytes(data.draw(damaged(searched[1])))
    with bounded():
        index = ImageIndex.load(path, searched[0])
        assert len(index.paths) == len(index.features)
        index.save(folder / "again.safetensors")

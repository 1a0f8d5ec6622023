"""`coca-score`: three reference formats, the official numbers, and one sentence for each mistake."""

import functools
import gzip
import json
import os
import re
from pathlib import Path

import pytest

from coca_lit.metrics.captions import caption_table
from coca_lit.tools.score import score, score_files

SHARED = Path(os.environ.get("COCA_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "captions"
REFERENCES = {1: "a red dog runs", 2: "two green birds sit", 3: "a blue cat"}


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def coco(path, **domains):
    images = [
        {"id": i, "file_name": f"{i}.jpg"} | ({"domain": domains[f"d{i}"]} if domains else {}) for i in REFERENCES
    ]
    annotations = [{"image_id": i, "id": i, "caption": text} for i, text in REFERENCES.items()]
    return write(path, {"images": images, "annotations": annotations})


def results(path, captions):
    return write(path, [{"image_id": i, "caption": text} for i, text in captions])


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared caption data not present")
@pytest.mark.slow
def test_published_scores(tmp_path, monkeypatch, capsys):
    """Without METEOR, whose published scores are in tests/metrics."""
    metrics = ("Bleu", "ROUGE_L", "CIDEr", "SPICE")
    monkeypatch.setattr("coca_lit.metrics.captions.caption_table", functools.partial(caption_table, metrics=metrics))
    files = [str(SHARED / name) for name in ("fakecap_results.json", "fakecap_refs.json")]
    score([*files, "--output", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    published = json.loads((SHARED / "expected_scores.json").read_text())["fakecap"]
    for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"):
        assert round(scores[name], 3) == published[name]
    shown = capsys.readouterr().out
    assert "SPICE not run: " in shown
    (cider,) = [line for line in shown.splitlines() if "CIDEr" in line]
    value, low, high = map(float, re.findall(r"[\d.]+", cider))
    assert value == 60.0
    assert 2 < value - low < 6
    assert 2 < high - value < 6


def test_formats(tmp_path, monkeypatch):
    without_java = functools.partial(caption_table, metrics=("Bleu", "CIDEr"), tokenize=list)
    monkeypatch.setattr("coca_lit.metrics.captions.caption_table", without_java)
    captions = results(tmp_path / "p.json", REFERENCES.items())
    rows = [
        {"imgid": i, "filename": f"{i}.jpg", "split": "val", "sentences": [{"raw": t}]} for i, t in REFERENCES.items()
    ]
    karpathy = write(tmp_path / "dataset_x.json", {"images": rows})
    plain = score_files(captions, coco(tmp_path / "coco.json")).scores
    assert plain["Bleu_4"] > 0.9
    assert score_files(captions, karpathy, "val").scores == plain
    nocaps = coco(tmp_path / "nocaps.json", d1="in-domain", d2="in-domain", d3="out-domain")
    packed = tmp_path / "nocaps.json.gz"
    packed.write_bytes(gzip.compress(nocaps.read_bytes()))
    assert {"in-domain/CIDEr", "out-domain/Bleu_1", "CIDEr"} <= score_files(captions, packed).scores.keys()


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([(1, "a"), (2, "b")], r"1 of 3 .*\[3\]"),
        ([(1, "a"), (2, "b"), (3, "c"), (9, "d")], r"1 captions .*\[9\]"),
        ([(1, "a"), (2, "b"), (3, "c"), (2, "d")], "image 2"),
        ([("1", "a"), ("2", "b"), ("3", "c")], "numbers.*texts"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, captions, message):
    files = [str(results(tmp_path / "p.json", captions)), str(coco(tmp_path / "coco.json"))]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        score(files)


def test_mistakes_in_references(tmp_path):
    captions = results(tmp_path / "p.json", REFERENCES.items())
    content = json.loads(coco(tmp_path / "coco.json").read_text())
    content["images"].append(content["images"][1])
    for broken, message in (
        (content, "image 2"),
        ({"images": [{"id": 1, "file_name": "x"}], "annotations": [{"caption": "a"}]}, "image_id"),
        ({"annotations": []}, "images"),
        ([1], r"broken\.json"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            score([str(captions), str(write(tmp_path / "broken.json", broken))])
    silent = [{"image_id": i, "caption": " "} for i in REFERENCES]
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in REFERENCES]
    with pytest.raises(SystemExit, match=r"error: .*reference"):
        score([str(captions), str(write(tmp_path / "silent.json", {"images": images, "annotations": silent}))])


def test_hallucinated_objects(tmp_path, monkeypatch, capsys):
    """The cat of image 2 is annotated, other animals are in references; the bus and the bird of image 3 are neither."""
    without_java = functools.partial(caption_table, metrics=("Bleu",), tokenize=list)
    monkeypatch.setattr("coca_lit.metrics.captions.caption_table", without_java)
    captions = results(tmp_path / "p.json", [(1, "a dog"), (2, "a cat"), (3, "kittens and a bus, a blue bird")])
    (tmp_path / "synonyms.txt").write_text("dog, puppy\ncat, kitten\nbus\nbird\n")
    instances = {"categories": [{"id": 9, "name": "cat"}], "annotations": [{"image_id": 2, "category_id": 9}]}
    files = ["--synonyms", str(tmp_path / "synonyms.txt"), "--instances", str(write(tmp_path / "i.json", instances))]
    score([str(captions), str(coco(tmp_path / "coco.json")), *files, "--output", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["CHAIRi"] == pytest.approx(2 / 5)  # the reference of image 3 names a cat, and no bus or bird
    assert scores["CHAIRs"] == pytest.approx(1 / 3)
    assert re.search(r"CHAIRi, objects that are not there, % +40 ", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        score(["p.json", "r.json", *files[:2]])


def test_the_folder_of_the_output_is_made_or_refused_before_scoring(tmp_path, monkeypatch, capsys):
    without_java = functools.partial(caption_table, metrics=("Bleu",), tokenize=list)
    monkeypatch.setattr("coca_lit.metrics.captions.caption_table", without_java)
    captions, references = results(tmp_path / "p.json", REFERENCES.items()), coco(tmp_path / "coco.json")
    score([str(captions), str(references), "--output", str(tmp_path / "new" / "scores.json")])
    assert json.loads((tmp_path / "new" / "scores.json").read_text())["Bleu_1"] > 0.9
    monkeypatch.delattr("coca_lit.tools.score.score_files")
    with pytest.raises(SystemExit, match=r"error: --output: .*coco\.json"):
        score([str(captions), str(references), "--output", str(references / "scores.json")])
    with pytest.raises(SystemExit):
        score([str(captions), str(references), "--output", str(tmp_path)])
    assert f"--output must name a file, but {tmp_path} is a folder" in capsys.readouterr().err


def test_a_file_of_another_kind_is_not_replaced(tmp_path):
    captions, references = results(tmp_path / "p.json", REFERENCES.items()), coco(tmp_path / "coco.json")
    for output in (captions, references):
        before = output.read_bytes()
        with pytest.raises(SystemExit, match=output.name):
            score([str(captions), str(references), "--output", str(output)])
        assert output.read_bytes() == before

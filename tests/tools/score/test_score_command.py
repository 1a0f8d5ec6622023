"""`coca-score`: three reference formats, the official numbers, and one sentence for each mistake."""

import functools
import gzip
import json
import re

import pytest

from coca_lit.metrics.captions import caption_table, tokenize_captions
from coca_lit.tools.score.command import examples, read_files, score, score_captions, warnings
from helpers.shared_data import CAPTIONS

REFERENCES = {1: "a red dog runs", 2: "two green birds sit", 3: "a blue cat"}


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def quick(monkeypatch):
    """Scores by BLEU and CIDEr alone, which need no Java."""
    table = functools.partial(caption_table, metrics=("Bleu", "CIDEr"), tokenize=list)
    monkeypatch.setattr("coca_lit.metrics.captions.caption_table", table)


def coco(path, **domains):
    images = [
        {"id": i, "file_name": f"{i}.jpg"} | ({"domain": domains[f"d{i}"]} if domains else {}) for i in REFERENCES
    ]
    annotations = [{"image_id": i, "id": i, "caption": text} for i, text in REFERENCES.items()]
    return write(path, {"images": images, "annotations": annotations})


def results(path, captions):
    return write(path, [{"image_id": i, "caption": text} for i, text in captions])


@pytest.mark.skipif(not CAPTIONS.is_dir(), reason="shared caption data not present")
@pytest.mark.slow
def test_published_scores(tmp_path, monkeypatch, capsys):
    """Without METEOR, whose published scores are in tests/metrics."""
    metrics = ("Bleu", "ROUGE_L", "CIDEr", "SPICE")
    monkeypatch.setattr("coca_lit.metrics.captions.caption_table", functools.partial(caption_table, metrics=metrics))
    files = [str(CAPTIONS / name) for name in ("fakecap_results.json", "fakecap_refs.json")]
    score([*files, "--output", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    published = json.loads((CAPTIONS / "expected_scores.json").read_text())["fakecap"]
    for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"):
        assert round(scores[name], 3) == published[name]
    shown = capsys.readouterr().out
    assert "SPICE not run: " in shown
    (cider,) = [line for line in shown.splitlines() if "CIDEr" in line]
    value, low, high = map(float, re.findall(r"[\d.]+", cider))
    assert value == 60.0
    assert 2 < value - low < 6
    assert 2 < high - value < 6


@pytest.mark.usefixtures("quick")
def test_formats(tmp_path, capsys):
    captions = results(tmp_path / "p.json", REFERENCES.items())
    rows = [
        {"imgid": i, "filename": f"{i}.jpg", "split": "val", "sentences": [{"raw": t}]} for i, t in REFERENCES.items()
    ]
    karpathy = write(tmp_path / "dataset_x.json", {"images": rows})
    plain = score_captions(*read_files(captions, coco(tmp_path / "coco.json"))).scores
    assert plain["Bleu_4"] > 0.9
    assert score_captions(*read_files(captions, karpathy, "val")).scores == plain
    nocaps = coco(tmp_path / "nocaps.json", d1="in-domain", d2="in-domain", d3="out-domain")
    packed = tmp_path / "nocaps.json.gz"
    packed.write_bytes(gzip.compress(nocaps.read_bytes()))
    assert {"in-domain/CIDEr", "out-domain/Bleu_1", "CIDEr"} <= score_captions(
        *read_files(captions, packed)
    ).scores.keys()
    score([str(captions), str(packed)])
    headings = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" images")]
    assert headings == ["all images, 3 images", "in-domain, 2 images", "out-domain, 1 images"]


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


@pytest.mark.usefixtures("quick")
def test_the_folder_of_the_output_is_made_or_refused_before_scoring(tmp_path, monkeypatch, capsys):
    captions, references = results(tmp_path / "p.json", REFERENCES.items()), coco(tmp_path / "coco.json")
    score([str(captions), str(references), "--output", str(tmp_path / "new" / "scores.json")])
    assert json.loads((tmp_path / "new" / "scores.json").read_text())["Bleu_1"] > 0.9
    monkeypatch.delattr("coca_lit.tools.score.command.read_files")
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


def test_scores_that_mislead_are_named(tmp_path, monkeypatch, capsys):
    """One reference, few images, one caption for all; and the best and worst captions as they are compared."""
    without_java = functools.partial(caption_table, metrics=("Bleu",), tokenize=list)
    monkeypatch.setattr("coca_lit.metrics.captions.caption_table", without_java)

    def tokenized(references, captions, tokenize=lambda texts: [text.lower() for text in texts]):
        return tokenize_captions(references, captions, tokenize)

    monkeypatch.setattr("coca_lit.metrics.captions.tokenize_captions", tokenized)
    files = [
        str(results(tmp_path / "p.json", [(i, "A red dog") for i in REFERENCES])),
        str(coco(tmp_path / "coco.json")),
    ]
    score([*files, "--examples", "1"])
    shown = capsys.readouterr().out
    assert "warning: 3 of 3 images have one reference" in shown
    assert "warning: CIDEr weighs words by these 3 images" in shown
    assert "warning: 1 of 3 captions are different, and 3 are 'A red dog'" in shown
    assert "\\x" not in shown
    assert re.search(r"best captions by CIDEr, tokenised\n +[\d.]+  a red dog  \(image 1\)\n +a red dog runs\n", shown)
    assert re.search(
        r"worst captions by CIDEr, tokenised\n +0\.0  a red dog  \(image 2\)\n +two green birds sit\n", shown
    )
    many = {i: ["a", "b"] for i in range(1000)}
    assert list(warnings(many, {i: str(i) for i in many})) == []
    assert list(examples(many, {}, 0)) == []

"""`coca-score --synonyms --instances`: CHAIR beside the other scores of a file of captions."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from coca_lit.metrics import is_share, lower_is_better
from coca_lit.metrics.captions import caption_table
from coca_lit.tools.score.command import score

REFERENCES = {1: "a red dog runs", 2: "two green birds sit", 3: "a blue cat"}


def write(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Captions and references, which are scored by BLEU and CIDEr alone: these need no Java."""
    table = functools.partial(caption_table, metrics=("Bleu", "CIDEr"), tokenize=list)
    monkeypatch.setattr("coca_lit.metrics.captions.caption_table", table)
    captions = {1: "a dog", 2: "a cat", 3: "kittens and a bus, a blue bird"}
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in REFERENCES]
    annotations = [{"image_id": i, "id": i, "caption": text} for i, text in REFERENCES.items()]
    return [
        write(tmp_path / "p.json", [{"image_id": i, "caption": text} for i, text in captions.items()]),
        write(tmp_path / "coco.json", {"images": images, "annotations": annotations}),
    ]


def test_hallucinated_objects(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cat of image 2 is annotated, other animals are in references; the bus and the bird of image 3 are neither."""
    (tmp_path / "synonyms.txt").write_text("dog, puppy\ncat, kitten\nbus\nbird\n")
    instances = {"categories": [{"id": 9, "name": "cat"}], "annotations": [{"image_id": 2, "category_id": 9}]}
    options = ["--synonyms", str(tmp_path / "synonyms.txt"), "--instances", write(tmp_path / "i.json", instances)]
    score([*files, *options, "--output", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["CHAIRi"] == pytest.approx(2 / 5)  # the reference of image 3 names a cat, and no bus or bird
    assert scores["CHAIRs"] == pytest.approx(1 / 3)
    assert "Bleu_1" in scores
    assert re.search(r"CHAIRi, objects that are not there, % +40 +\[\d+, \d+\]", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        score(["p.json", "r.json", *options[:2]])
    assert "CHAIR needs both --synonyms and --instances" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"error: .*nothing\.txt"):
        score([*files, "--synonyms", str(tmp_path / "nothing.txt"), *options[2:]])


def test_options_that_would_be_ignored_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    chair = ["--synonyms", "s", "--instances", "i"]
    for words in (["--judgments", "a.csv", *chair], [*chair, "--judgments", "a.csv"], chair[2:]):
        with pytest.raises(SystemExit):
            score(words)
    assert capsys.readouterr().err.count("error: ") == 3


def test_fewer_hallucinations_are_better() -> None:
    assert lower_is_better("x/CHAIRs")
    assert not lower_is_better("x/text_score")
    assert is_share("CHAIRi")
    assert is_share("winoground/pmi/group_score")

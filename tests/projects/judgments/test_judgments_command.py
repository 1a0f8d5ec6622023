"""`coca-score --judgments`: tables of agreement, and one sentence for each mistake."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")

from coca_lit.tools.score.command import score
from helpers.shared_data import SHARED

REFERENCES = {1: "a red dog runs", 2: "two green birds sit", 3: "a blue cat"}


def coco(path: Path) -> Path:
    """References in a file of COCO captions."""
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in REFERENCES]
    annotations = [{"image_id": i, "id": i, "caption": text} for i, text in REFERENCES.items()]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_files_of_judgements_are_told_apart_by_name(tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "mine.csv")
        files[-1].write_text("image,caption,grade\n1,a hat,2\n2,a hat,3\n")
    with pytest.raises(SystemExit, match="same name"):
        score(["--judgments", *map(str, files), "--captions", str(coco(tmp_path / "coco.json"))])


def test_options_that_would_be_ignored_are_refused(capsys):
    with pytest.raises(SystemExit):
        score(["--judgments", "a.csv", "--examples", "3"])
    assert "does not belong to --judgments" in capsys.readouterr().err


def test_judgments_without_a_tau(tmp_path, monkeypatch):
    """Equal grades have no rank correlation: JSON has null for it, and the file may be written again."""
    scores = {"CIDEr": np.arange(3.0)}  # the real scores need Java
    monkeypatch.setattr("coca_lit.projects.judgments.agreement.reference_scores", lambda *_, **__: (scores, {}))
    table, output = tmp_path / "mine.csv", tmp_path / "scores.json"
    table.write_text("image,caption,grade\n" + "".join(f"{name},a hat,2\n" for name in REFERENCES))
    for _ in range(2):
        score(["--judgments", str(table), "--captions", str(coco(tmp_path / "coco.json")), "--output", str(output)])
        assert json.loads(output.read_text())["mine.csv/tau_b_CIDEr"] is None


@pytest.mark.skipif(not (SHARED / "judgments").is_dir(), reason="shared judgements not present")
@pytest.mark.slow
def test_judgments(tmp_path, monkeypatch, capsys):
    """A table for each measure, with people, intervals and differences; --output has the numbers."""
    monkeypatch.setenv("COCA_SPICE_JARS", str(tmp_path))
    folder = SHARED / "judgments"
    lines = (folder / "ExpertAnnotations.txt").read_text().splitlines()[:200]
    (tmp_path / "some.txt").write_text("\n".join(lines))
    files = ["--judgments", str(tmp_path / "some.txt"), "--captions", str(folder / "Flickr8k.token.txt")]
    score([*files, "--output", str(tmp_path / "scores.json")])
    shown = capsys.readouterr().out
    assert re.search(r"some\.txt: \d+ captions of \d+ images; \d+ grades of 3 judges, each a point of its own", shown)
    assert "SPICE not run: " in shown
    for title in ("Kendall's tau-b, times 100", "Kendall's tau-c, times 100"):
        assert re.search(rf"{title} +minus CIDEr +p\n  BLEU-1 +[\d.]+ +\[.*\] +-[\d.]+ +\[.*\] +[\d.]+\n", shown)
    assert re.search(r"people with each other +[\d.]+ ", shown)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert 0.2 < scores["some.txt/tau_c_CIDEr"] < 0.8
    with pytest.raises(SystemExit):
        score(["p.json", "r.json", *files])
    with pytest.raises(SystemExit, match=r"error: .*nothing\.txt"):
        score(["--judgments", str(tmp_path / "nothing.txt"), *files[2:]])

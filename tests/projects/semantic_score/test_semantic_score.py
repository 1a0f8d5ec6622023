"""Semantic scores, against sentence-transformers with the same weights."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from coca_lit.data.records import Record
from coca_lit.errors import DataError
from coca_lit.projects.semantic_score import encoder as encoding
from coca_lit.projects.semantic_score.command import score_with_meaning
from coca_lit.projects.semantic_score.measure import semantic_scores

CAPTIONS = {1: "Someone is cycling down a road.", 2: "a dog sleeps", 3: "A dog sleeps on the sofa. " * 60}
REFERENCES = {
    1: ["a man rides a bike on a street", "two cats on a wall", "a person on a bicycle"],
    2: ["a dog sleeps"],
    3: ["A dog sleeps on the sofa.", "the 'Café' is closed!"],
}


@pytest.fixture
def records() -> list[Record]:
    pytest.importorskip("sentence_transformers", reason="needs coca_lit[semantic]")
    return [Record(key, "x.png", texts) for key, texts in REFERENCES.items()]


@pytest.mark.slow
def test_scores_are_cosines_of_sentence_transformers(records: list[Record], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    found = encoding.importlib.util.find_spec(encoding.PACKAGE)
    with zipfile.ZipFile(Path(found.origin).with_name("model.zip")) as archive:
        archive.extractall(tmp_path)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    parts = semantic_scores(records, CAPTIONS)
    for i, (key, caption) in enumerate(CAPTIONS.items()):
        texts = model.encode([caption, *REFERENCES[key]], normalize_embeddings=True)
        cosines = texts[1:] @ texts[0]
        assert parts["semantic_best"][0][i] == pytest.approx(cosines.max(), abs=1e-5)
        assert parts["semantic_mean"][0][i] == pytest.approx(cosines.mean(), abs=1e-5)


@pytest.mark.slow
def test_the_command(records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions, references, scores = (tmp_path / name for name in ("p.json", "r.json", "scores.json"))
    predictions.write_text(json.dumps([{"image_id": key, "caption": text} for key, text in CAPTIONS.items()]))
    annotations = [
        {"image_id": key, "id": 10 * key + i, "caption": text}
        for key, texts in REFERENCES.items()
        for i, text in enumerate(texts)
    ]
    images = [{"id": key, "file_name": f"{key}.jpg"} for key in CAPTIONS]
    references.write_text(json.dumps({"images": images, "annotations": annotations}))
    score_with_meaning([str(predictions), str(references), "--semantic", "--output", str(scores)])
    expected = np.mean(semantic_scores(records, CAPTIONS)["semantic_best"][0])
    assert json.loads(scores.read_text())["semantic_best"] == pytest.approx(expected)
    assert "semantic score, nearest reference" in capsys.readouterr().out


def test_without_the_wheel_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PACKAGE", "no_such_package")
    encoding.sentence_encoder.cache_clear()
    with pytest.raises(DataError, match=r"coca_lit\[semantic\]"):
        encoding.sentence_encoder()
    encoding.sentence_encoder.cache_clear()

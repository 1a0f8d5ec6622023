"""Scores of labels equal scikit-learn's."""

from pathlib import Path

import pytest

pytest.importorskip("sklearn")
from sklearn.metrics import top_k_accuracy_score

from coca_lit.data.records import Record
from coca_lit.errors import DataError
from coca_lit.evals import Settings
from coca_lit.projects.classification.labels import LabelScores
from helpers.kept_classifiers import Guess, with_guess


def test_top5_of_many_classes(tmp_path: Path) -> None:
    classes = [f"class {i}" for i in range(12)]
    records = [Record(i, lambda: None, classes[i % 12]) for i in range(60)]  # type: ignore[arg-type, return-value]
    found = LabelScores("mine", records).evaluate(with_guess(classes), Settings(tmp_path, full=False))
    logits = Guess(classes).logits(None, records).numpy()
    numbers = [i % 12 for i in range(60)]
    assert found["mine/top5"] == pytest.approx(top_k_accuracy_score(numbers, logits, k=5))
    assert found["mine/accuracy"] == pytest.approx(top_k_accuracy_score(numbers, logits, k=1))


def test_without_a_classifier_and_with_unknown_labels(tmp_path: Path) -> None:
    records = [Record(i, lambda: None, "cat") for i in range(3)]  # type: ignore[arg-type, return-value]
    evaluation = LabelScores("mine", records)
    assert evaluation.evaluate(None, Settings(tmp_path)) == {}  # type: ignore[arg-type]
    assert "no classifier" in evaluation.not_run["mine labels"]
    with pytest.raises(DataError, match=r"3 of 3 records have a label.*'cat'.*dog, fish"):
        evaluation.evaluate(with_guess(("dog", "fish")), Settings(tmp_path))

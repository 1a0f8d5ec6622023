"""Scores of labels equal scikit-learn's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.errors import DataError
from coca_lit.evals import Settings
from coca_lit.projects.classification.labels import LabelScores


class Guess:
    """Logits that are right in two thirds of the cases."""

    def __init__(self, classes: Any) -> None:
        self.classes = list(classes)

    def logits(self, net: Any, records: Any, batch_size: int = 64, num_workers: int = 0) -> Tensor:
        torch.manual_seed(1)
        right = torch.tensor(
            [
                (self.classes * 2 + [record.captions[0]]).index(record.captions[0]) % len(self.classes)
                for record in records
            ]
        )
        return torch.randn(len(records), len(self.classes)) + torch.eye(len(self.classes))[right]


def with_guess(classes: Any) -> Any:
    """A model that has nothing but a classifier."""
    return SimpleNamespace(objectives={"labels": Guess(classes)})


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

"""Scores of labels of statements equal loops and scikit-learn's."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")
from sklearn.metrics import accuracy_score

from coca_lit.errors import DataError
from coca_lit.evals import Settings
from coca_lit.projects.reasoning.accuracy import blind_answers
from coca_lit.projects.reasoning.evaluations import StatementScores
from coca_lit.projects.reasoning.scene_statements import LABELS, comparison_records, entailment_records
from helpers.kept_classifiers import Guess, with_guess


def test_scores_are_shares_of_right_labels(tmp_path: Path) -> None:
    records = entailment_records("val", size=32, count=40)
    training = entailment_records("train", size=32, count=200)
    evaluation = StatementScores("mine", records, lambda: training)
    found = evaluation.evaluate(with_guess(LABELS), Settings(tmp_path))
    chosen = [LABELS[i] for i in Guess(LABELS).logits(None, records).argmax(dim=1).tolist()]
    truth = [record.captions[0] for record in records]
    expected = {"mine/accuracy": accuracy_score(truth, chosen)}
    for kind in ("colour", "count", "relation"):
        rows = [i for i, record in enumerate(records) if record.domain == kind]
        expected[f"mine/{kind}/accuracy"] = accuracy_score([truth[i] for i in rows], [chosen[i] for i in rows])
    blind = blind_answers({r.id: r.question for r in records}, [(r.question, r.captions[0]) for r in training])
    expected["mine/blind/accuracy"] = accuracy_score(truth, [*blind.values()])
    assert found == pytest.approx(expected)
    assert 0.4 < found["mine/accuracy"] < 0.9
    assert evaluation.draws.keys() == found.keys()
    low, high = evaluation.draws["mine/accuracy"].interval()
    assert low < found["mine/accuracy"] < high
    rows = json.loads((tmp_path / "predictions" / "mine.json").read_text())
    assert [row["label"] for row in rows] == chosen
    quick = evaluation.evaluate(with_guess(LABELS), Settings(tmp_path, full=False), 60)
    assert quick["mine_60/accuracy"] == accuracy_score(truth[:60], chosen_of(records[:60]))


def test_a_training_without_answers_gives_no_blind_guess(tmp_path: Path) -> None:
    records = entailment_records("val", size=32, count=4)
    evaluation = StatementScores("mine", records, lambda: [record._replace(captions=()) for record in records])
    assert "mine/accuracy" in evaluation.evaluate(with_guess(LABELS), Settings(tmp_path))
    assert evaluation.not_run == {"mine blind": "the training has no answers to guess from"}


def chosen_of(records: Any) -> list[str]:
    return [LABELS[i] for i in Guess(LABELS).logits(None, records).argmax(dim=1).tolist()]


def test_the_bootstrap_draws_images_with_all_their_texts(tmp_path: Path) -> None:
    """The draws of a score are those of a loop that repeats the rows of an image."""
    records = entailment_records("val", size=32, count=20)
    evaluation = StatementScores("mine", records)
    evaluation.evaluate(with_guess(LABELS), Settings(tmp_path))
    by_image = defaultdict(list)
    for record, label in zip(records, chosen_of(records), strict=True):
        by_image[record.image].append(label == record.captions[0])
    units = [*by_image.values()]
    random = np.random.default_rng([0, len(units)])
    drawn = random.integers(len(units), size=(1000, len(units)))[:5]
    expected = [np.mean([right for unit in row for right in units[unit]]) for row in drawn]
    np.testing.assert_allclose(evaluation.draws["mine/accuracy"].values[:5], expected)


def test_consistency_is_the_share_of_texts_that_are_right_beside_all_images(tmp_path: Path) -> None:
    records = comparison_records("val", size=32, count=40)
    evaluation = StatementScores("mine", records, together=lambda record: record.question)
    found = evaluation.evaluate(with_guess(("false", "true")), Settings(tmp_path))
    logits = Guess(("false", "true")).logits(None, records)
    right = defaultdict(list)
    for record, row in zip(records, logits, strict=True):
        right[record.question].append(bool(row[1] > row[0]) == (record.captions[0] == "true"))
    assert found["mine/consistency"] == pytest.approx(np.mean([all(rows) for rows in right.values()]))
    assert 0 < found["mine/consistency"] < found["mine/accuracy"]
    low, high = evaluation.draws["mine/consistency"].interval()
    assert 0 < low < high < 1


def test_a_record_without_a_label() -> None:
    records = entailment_records("val", size=32, count=3)
    with pytest.raises(DataError, match="no caption"):
        StatementScores("mine", [records[0]._replace(captions=())])

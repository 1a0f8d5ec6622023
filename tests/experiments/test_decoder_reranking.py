"""The study of re-ranking: at both ends of the weights its rows are the scores of the evaluations."""

import pytest
import torch

from coca_lit.data.scenes.render import scene_records
from coca_lit.evals import Settings
from coca_lit.evals.retrieval import RetrievalScores
from coca_lit.projects.choice.evaluation import ChoiceScores
from coca_lit.projects.choice.scenes import scene_choice_records
from experiments.decoder_reranking import rows


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def close(row: dict[str, str], score: str, expected: float) -> bool:
    return float(row[score]) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_recall_is_that_of_the_evaluation(tiny_model, tmp_path, count: int) -> None:
    """Fewer candidates than were read are as if only they had been."""
    model, records = tiny_model(), scene_records("val", count=6)
    found = {(row["count"], row["weight"]): row for row in rows.reranked_rows(model, records, [2, 4])}
    assert int(found["2", "0.0"]["pairs"]) < int(found["4", "0.0"]["pairs"]) <= 6 * 30
    for weight in ("0.0", "0.5", "1.0"):
        expected = RetrievalScores("few", records, float(weight)).evaluate(model, Settings(tmp_path, rerank=count))
        for score in ("t2i_recall@1", "i2t_recall@1", "t2i_recall@5"):
            assert close(found[str(count), weight], score, expected[f"few/reranked_{score}"])


def test_choices_are_those_of_the_evaluation(tiny_model, tmp_path) -> None:
    model, records = tiny_model(), scene_choice_records("val", count=6)
    expected = ChoiceScores("few", records).evaluate(model, Settings(tmp_path))
    found = {(row["way"], row["weight"]): row for row in rows.choice_rows(model, records)}
    for way, weight, name in (("pmi", "0.0", ""), ("likelihood", "1.0", "likelihood/"), ("pmi", "1.0", "pmi/")):
        for score in ("accuracy", "order_accuracy", "colour_accuracy", "shape_accuracy"):
            assert close(found[way, weight], score, expected[f"few/{name}{score}"])

"""Retrieval beyond plain recall: folds, what a model does not read of long captions, and other comparisons."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.data.transforms import build_transform
from coca_lit.evals import Settings
from coca_lit.evals.base import required_objective
from coca_lit.evals.inference import embed_pairs
from coca_lit.evals.retrieval import Comparison, RetrievalScores, rerank
from coca_lit.metrics.retrieval import recall_at_k
from coca_lit.models import DualEncoder
from helpers.evaluating import WORDS, make_model, noise, records

TEXTS = [" ".join([word] * count) for word, count in zip(WORDS, (3, 22, 23, 40), strict=False)]


def naive_recall(similarity: Tensor, owner: list[int], k: int) -> tuple[float, float]:
    """Text to image, image to text."""
    t2i = [owner[t] in similarity[:, t].topk(k).indices for t in range(len(owner))]
    i2t = [any(owner[t] == i for t in similarity[i].topk(k).indices) for i in range(len(similarity))]
    return sum(t2i) / len(t2i), sum(i2t) / len(i2t)


def test_folds_are_searched_by_themselves(tmp_path: Path) -> None:
    """The mean over three folds of two images, of seven."""
    listed: list[Record] = [record._replace(captions=record.captions * 2) for record in records()]
    model = make_model()
    evaluation = RetrievalScores("x", listed, fold=2)
    scores = evaluation.evaluate(model, Settings(tmp_path))
    images, texts, owner = embed_pairs(model, listed)
    of_folds = []
    for start in (0, 2, 4):
        own = (owner >= start) & (owner < start + 2)
        of_folds.append((images[start : start + 2] @ texts[own].T, (owner[own] - start).tolist()))
    t2i = sum(naive_recall(*fold, 1)[0] * len(fold[1]) for fold in of_folds) / sum(len(own) for _, own in of_folds)
    i2t = sum(naive_recall(*fold, 1)[1] for fold in of_folds) / 3
    assert scores["x/folds/t2i_recall@1"] == pytest.approx(t2i)
    assert scores["x/folds/i2t_recall@1"] == pytest.approx(i2t)
    assert evaluation.draws["x/folds/i2t_recall@1"].trials == 6
    assert not any(
        "folds" in score for score in RetrievalScores("x", listed[:3], fold=2).evaluate(model, Settings(tmp_path))
    )


def test_what_is_not_read_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The context of 24 takes 22 words, start and end: 23 and 40 words are cut."""
    listed = [Record(i, partial(noise, i), [text]) for i, text in enumerate(TEXTS)]
    evaluation = RetrievalScores("mine", listed)
    scores = evaluation.evaluate(make_model(), Settings(tmp_path))
    assert scores["mine/cut_captions"] == 0.5
    assert scores["mine/read_tokens"] == pytest.approx((5 + 24 + 24 + 24) / (5 + 24 + 25 + 42))
    assert "2 of 4 captions of mine are longer than the 24 tokens" in capsys.readouterr().out
    assert {"mine/cut_captions", "mine/t2i_recall@1"} <= evaluation.draws.keys()
    short = RetrievalScores("mine", listed[:2]).evaluate(make_model(), Settings(tmp_path))
    assert "mine/cut_captions" not in short


class Likelihoods(Comparison):
    """log p(text | image) of every image with every text, as a user may compute it."""

    def __init__(self) -> None:
        self.encoded: dict[str, int] = {"images": 0, "texts": 0}

    def encode_images(self, model: DualEncoder, images: Tensor) -> Tensor:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.encoded["images"] += len(images)
        return images

    def encode_texts(self, model: DualEncoder, tokens: Tensor) -> Tensor:
        self.encoded["texts"] += len(tokens)
        return tokens

    def compare(self, model: DualEncoder, images: Tensor, texts: Tensor) -> Tensor:
        assert not model.training
        rows = [model.log_likelihood(image.expand(len(texts), -1, -1, -1), texts) for image in images]
        return torch.stack(rows)


class Vectors(Comparison):
    """Cosines, of a model with an objective."""

    def check(self, model: DualEncoder) -> None:
        required_objective(model, torch.nn.Linear)

    def compare(self, model: DualEncoder, images: Tensor, texts: Tensor) -> Tensor:
        return images @ texts.T


def test_another_comparison_re_ranks(tmp_path: Path) -> None:
    model, weight = make_model(), 0.3
    images, texts, image_of_text = embed_pairs(model, records())
    transform = build_transform(**model.preprocessing)
    captions = [caption for record in records() for caption in record.captions]
    with torch.no_grad():
        pixels = torch.stack([transform(record.image()) for record in records()])
        read = Likelihoods().compare(model.eval(), pixels, model.tokenizer(captions))
    cosines = model.logit_scale.exp().item() * images @ texts.T
    model.train()
    expected = ((1 - weight) * cosines + weight * read).double()
    comparison = Likelihoods()
    found = rerank(model, records(), images, texts, 7, weight, batch_size=2, comparison=comparison)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert model.training
    assert comparison.encoded == {"images": 7, "texts": len(captions)}  # each once
    few = rerank(model, records(), images, texts, 2, weight, comparison=comparison)
    asked = few > -1000
    assert 2 * len(captions) <= asked.sum() < asked.numel()
    torch.testing.assert_close(few[asked], expected[asked], atol=1e-4, rtol=1e-4)

    evaluation = RetrievalScores("mine", records(), weight, comparison=comparison)
    scores = evaluation.evaluate(model, Settings(tmp_path, rerank=7))
    for name, value in recall_at_k(expected, image_of_text).items():
        assert scores[f"mine/reranked_{name}"] == value
    settings = evaluation.conditions["mine/reranked_t2i_recall@1"].settings
    assert settings["comparison"].endswith("test_retrieval_scores.Likelihoods")
    assert settings["rerank"] == 7


def test_an_evaluation_has_its_own_number_of_candidates(tmp_path: Path) -> None:
    model = make_model()
    shared = RetrievalScores("mine", records()).evaluate(model, Settings(tmp_path, rerank=2))
    evaluation = RetrievalScores("mine", records(), rerank=2)
    assert evaluation.evaluate(model, Settings(tmp_path)) == shared
    assert evaluation.conditions["mine/reranked_t2i_recall@1"].settings["rerank"] == 2
    never = RetrievalScores("mine", records(), rerank=0).evaluate(model, Settings(tmp_path, rerank=2))
    assert never == {name: value for name, value in shared.items() if "reranked" not in name}
    with pytest.raises(ValueError, match=r"rerank\b.*-1"):
        RetrievalScores("mine", records(), rerank=-1)


def test_a_comparison_names_the_objective_that_it_needs(tmp_path: Path) -> None:
    model = make_model()
    model.decoder = None  # which is asked nothing
    evaluation = RetrievalScores("mine", records(), 1.0, comparison=Vectors(), rerank=7)
    scores = evaluation.evaluate(model, Settings(tmp_path))
    assert "mine/t2i_recall@1" in scores
    assert not any("reranked" in name for name in scores)
    assert "the model has no Linear" in evaluation.not_run["mine reranked recall"]
    model.objectives = {"other": torch.nn.Identity(), "wanted": torch.nn.Linear(1, 1)}
    scores = evaluation.evaluate(model, Settings(tmp_path))
    assert not evaluation.not_run
    assert scores["mine/reranked_t2i_recall@1"] == scores["mine/t2i_recall@1"]

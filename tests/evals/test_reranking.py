"""Decoder re-ranking of retrieval, against a loop over pairs and a case worked by hand."""

from typing import Any

import pytest
import torch

from coca_lit.data.transforms import build_transform
from coca_lit.evals import Settings
from coca_lit.evals.inference import embed_pairs
from coca_lit.evals.retrieval import BEHIND, RetrievalScores, informative, mix_scores, rerank
from coca_lit.metrics.retrieval import feature_ranks, recall_at_k
from helpers.evaluating import make_model, records
from helpers.family import check_each_text_passes_the_tower_once
from helpers.slow import slow

WEIGHT = 0.4


def look(candidates: int, batch_size: int = 2) -> Any:
    model = make_model()
    images, texts, _ = embed_pairs(model, records(), batch_size)
    return rerank(model, records(), images, texts, candidates, WEIGHT, batch_size)


@torch.no_grad()
def naive_log_likelihoods() -> torch.Tensor:
    """(I, T), text by text and token by token."""
    model = make_model().eval()
    transform = build_transform(size=model.image_size)
    images = torch.stack([transform(record.image()) for record in records()])
    captions = [caption for record in records() for caption in record.captions]
    found = torch.zeros(len(records()), len(captions))
    for t, caption in enumerate(captions):
        ids = model.tokenizer.encode(caption)
        for end in range(1, len(ids)):
            begun = torch.tensor([[*ids[:end], model.tokenizer.eot_id]]).expand(len(images), -1)
            logits = model(images, begun).logits.unflatten(0, (len(images), -1))  # (I, end, V)
            found[:, t] += logits[:, -1].log_softmax(-1)[:, ids[end]]
    return found


def test_equals_a_loop_over_pairs() -> None:
    model = make_model()
    images, texts, _ = embed_pairs(model, records())
    read = naive_log_likelihoods()
    assert read.std(dim=0).min() > 0.01  # images make a difference
    prior = read.exp().mean(dim=0).log()
    expected = (1 - WEIGHT) * model.logit_scale.exp() * images @ texts.T + WEIGHT * (read - prior)
    torch.testing.assert_close(look(candidates=7), expected.detach().double(), atol=1e-4, rtol=1e-4)
    assert model.training


def test_each_text_passes_the_tower_once(monkeypatch) -> None:
    check_each_text_passes_the_tower_once(monkeypatch)


@pytest.mark.parametrize("batch_size", [*slow(1), 3, *slow(64)])
def test_batches_do_not_matter(batch_size: int) -> None:
    torch.testing.assert_close(look(3, batch_size), look(3), atol=1e-4, rtol=1e-4)


def test_what_was_not_read_follows_by_cosine() -> None:
    model = make_model()
    images, texts, _ = embed_pairs(model, records())
    cosines, found = images @ texts.T, look(candidates=2)
    unread = found < -BEHIND / 2
    likely = torch.zeros_like(unread)
    for t in range(cosines.shape[1]):
        likely[cosines[:, t].argsort(descending=True)[:2], t] = True
    for i in range(len(cosines)):  # 13 texts of 7 images: as many pairs are 4 texts for each image
        likely[i, cosines[i].argsort(descending=True)[:4]] = True
    assert unread.any()
    assert torch.equal(unread, ~likely)
    for i, row in enumerate(found):
        order = row.argsort(descending=True)
        assert not unread[i, order[: int(likely[i].sum())]].any()
        rest = order[int(likely[i].sum()) :]
        assert torch.equal(rest, rest[cosines[i, rest].argsort(descending=True)])


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same(on_ranks) -> None:
    alone = look(3)
    for found in on_ranks(3, look, 3):
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_scores_stand_beside_those_of_the_vectors(tmp_path) -> None:
    model = make_model()
    evaluation = RetrievalScores("seven", records(), rerank_weight=WEIGHT)
    plain = evaluation.evaluate(model, Settings(tmp_path, batch_size=4))
    both = evaluation.evaluate(model, Settings(tmp_path, batch_size=4, rerank=7))
    image_of_text = embed_pairs(model, records())[2]
    again = {f"seven/reranked_{name}": value for name, value in recall_at_k(look(7), image_of_text).items()}
    assert both == plain | again


def test_mixture_by_hand() -> None:
    similarity = torch.tensor([[3.0, 1.0], [2.0, 4.0]])
    read = torch.tensor([[0.5, 0.0], [0.25, 0.1]]).log()  # -inf: not read
    # p(text) is (0.5 + 0.25) / 2 for the first text, 0.1 for the second, which was read with one image only.
    log = torch.tensor([0.5 / 0.375, 0.25 / 0.375]).log()
    found = mix_scores(similarity, informative(read), weight=0.5)
    expected = torch.tensor([[1.5 + log[0] / 2, 1.0 - BEHIND], [1 + log[1] / 2, 2.0]]).double()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_near_cosines_of_what_was_not_read_keep_their_order(weight: float) -> None:
    """Fifty cosines as near as float32 can tell them apart."""
    cosines = 0.3 + torch.arange(50) * 2.0**-25
    assert cosines.diff().gt(0).all()
    read = torch.full((50, 1), -torch.inf)
    read[7] = -40.0
    order = mix_scores(100 * cosines[:, None], informative(read), weight)[:, 0].argsort(descending=True, stable=True)
    assert order.tolist() == [7, *(i for i in range(49, -1, -1) if i != 7)]


def test_wrong_arguments_are_refused_before_training() -> None:
    for weight in (2.0, -0.1):
        with pytest.raises(ValueError, match=rf"rerank_weight.*{weight}"):
            RetrievalScores("seven", records(), rerank_weight=weight)
    with pytest.raises(ValueError, match=r"rerank\b.*-1"):
        Settings("unused", rerank=-1)


def test_wrong_arguments(tmp_path) -> None:
    model = make_model()
    model.decoder = None
    with pytest.raises(ValueError, match="decoder_layers=0"):
        model.log_likelihood(torch.zeros(1, 3, 32, 32), model.tokenizer("one"))
    evaluation = RetrievalScores("seven", records())
    ranks = feature_ranks(*embed_pairs(model, records()))
    assert set(evaluation.evaluate(model, Settings(tmp_path, rerank=3))) == {f"seven/{name}" for name in ranks.scores()}
    assert "no decoder" in evaluation.not_run["seven reranked recall"]

"""Retrieval metrics against hand-worked cases and a naive top-k loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coca_lit.metrics.retrieval import feature_ranks, recall_at_k
from helpers.fuzzing import fuzz


def naive_recall(similarity, image_of_text, k):
    """Top-k by sorting, one query at a time; right only without ties."""
    images, texts = similarity.shape
    t2i = [image_of_text[t] in similarity[:, t].argsort(descending=True)[:k] for t in range(texts)]
    i2t = [i in image_of_text[similarity[i].argsort(descending=True)[:k]] for i in range(images)]
    return {f"t2i_recall@{k}": sum(t2i) / texts, f"i2t_recall@{k}": sum(i2t) / images}


def retrieval_scores(images, texts, image_of_text, ks=(1, 5, 10), chunk=1000):
    return feature_ranks(images, texts, image_of_text, chunk).scores(ks)


def unit_features(seed: int, texts_of: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit features of images with this many noisy captions each, shuffled; no two similarities are equal."""
    generator, count = torch.Generator().manual_seed(seed), len(texts_of)
    images = torch.randn(count, 8, generator=generator)
    image_of_text = torch.arange(count).repeat_interleave(torch.tensor(texts_of))
    image_of_text = image_of_text[torch.randperm(len(image_of_text), generator=generator)]
    texts = images[image_of_text] + 1.5 * torch.randn(len(image_of_text), 8, generator=generator)
    return images / images.norm(dim=1, keepdim=True), texts / texts.norm(dim=1, keepdim=True), image_of_text


def test_worked_example_of_the_docstring():
    similarity = torch.tensor([[0.9, 0.4, 0.1, 0.2], [0.3, 0.5, 0.6, 0.4]])
    assert recall_at_k(similarity, [0, 0, 0, 1], ks=(1, 2, 3)) == {
        "t2i_recall@1": 0.5, "t2i_recall@2": 1.0, "t2i_recall@3": 1.0,
        "i2t_recall@1": 0.5, "i2t_recall@2": 0.5, "i2t_recall@3": 1.0,
    }  # fmt: skip


def test_unequal_captions_by_hand():
    image_of_text = torch.tensor([1, 1, 0, 2, 1])
    similarity = torch.tensor([[5.0, 1.0, 4.0, 3.0, 2.0], [4.0, 5.0, 6.0, 2.0, 7.0], [3.0, 2.0, 5.0, 4.0, 1.0]])
    # Places of the texts' images (columns): 2, 1, 3, 1, 1. Places of the images' best texts (rows): 2, 1, 2.
    assert retrieval_scores(torch.eye(3), similarity.T, image_of_text, ks=(1, 2)) == {
        "t2i_recall@1": 3 / 5, "t2i_recall@2": 4 / 5, "t2i_median_rank": 1.0,
        "i2t_recall@1": 1 / 3, "i2t_recall@2": 1.0, "i2t_median_rank": 2.0,
    }  # fmt: skip


@fuzz
@given(st.integers(0, 99), st.lists(st.integers(1, 7), min_size=11, max_size=30), st.integers(1, 40))
def test_recalls_are_those_of_a_naive_loop_in_any_order_and_chunks(seed: int, texts_of: list[int], chunk: int) -> None:
    images, texts, image_of_text = unit_features(seed, texts_of)
    scores = retrieval_scores(images, texts, image_of_text, chunk=chunk)
    expected = {n: v for k in (1, 5, 10) for n, v in naive_recall(images @ texts.T, image_of_text, k).items()}
    assert (
        expected
        == {name: scores[name] for name in expected}
        == recall_at_k((images @ texts.T).numpy(), image_of_text.numpy())
    )
    assert scores.keys() - expected.keys() == {"t2i_median_rank", "i2t_median_rank"}
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    assert scores == retrieval_scores(images[order], texts.flip(0), order.argsort()[image_of_text.flip(0)])


def test_collapsed_model_gains_nothing_from_ties():
    scores = retrieval_scores(torch.ones(20, 4), torch.ones(40, 4), torch.arange(20).repeat(2))
    assert {value for name, value in scores.items() if "recall" in name} == {0.0}
    assert (scores["t2i_median_rank"], scores["i2t_median_rank"]) == (20.0, 39.0)


def test_half_precision_features_are_ranked_in_float32():
    images = torch.tensor([[1.0, 1 / 1024], [1.0, -1 / 1024]], dtype=torch.bfloat16)
    texts = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.bfloat16)  # bfloat16 products would tie
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert set(retrieval_scores(images, texts, torch.tensor([0, 1]), ks=(1,)).values()) == {1.0}


def test_nan_is_an_error():
    similarity = torch.eye(3)
    similarity[1, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        recall_at_k(similarity, torch.arange(3))
    with pytest.raises(ValueError, match="NaN"):
        retrieval_scores(similarity, torch.eye(3), torch.arange(3))

"""Statistics, CLIPScore, domains by hand."""

import pytest
import torch

from coca_lit.metrics.captions import are_novel, caption_scores, caption_statistics, caption_table, clip_scores


def test_statistics_by_hand():
    # words: a red dog / a dog ; pairs: a-red red-dog / a-dog
    assert caption_statistics(["A red dog.", "a  dog"]) == pytest.approx(
        {"mean_length": 2.5, "vocabulary": 3, "distinct_1": 3 / 5, "distinct_2": 1}
    )
    assert caption_statistics(["a a a"])["distinct_2"] == 0.5
    assert caption_statistics([""])["mean_length"] == 0


def test_novelty_by_hand():
    assert are_novel(["A dog.", "a cat", "a cow"], ["a dog", "the cow"]) == [False, True, True]
    assert are_novel(["a t - shirt of size 1 0"], ["A T-shirt, of size 10."]) == [False]  # as byte pairs write it


def means(scores: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: values.mean().item() for name, values in scores.items()}


def test_clip_scores_by_hand():
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    captions = torch.tensor([[0.6, 0.8], [-1.0, 0.0]])
    references = torch.tensor([[0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    scores = clip_scores(images, captions, references, torch.tensor([0, 0, 1]))
    # Image 0: 2.5 * 0.6 and the better of 0.96 and 0.8. Image 1: a negative cosine counts as 0, which makes the
    # harmonic mean 0.
    assert means(scores) == pytest.approx({"CLIPScore": 1.5 / 2, "RefCLIPScore": 2 * 1.5 * 0.96 / (1.5 + 0.96) / 2})
    with pytest.raises(ValueError, match="caption"):
        clip_scores(images, captions[:1], references, torch.tensor([0, 0, 1]))


def test_a_caption_far_from_all_references_fits_them_at_zero():
    """2.5 max(cos, 0) of the caption and its image is 2.5 · 0.6; the cosine of caption and only reference is -1."""
    image, caption, reference = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]]), torch.tensor([[-0.6, -0.8]])
    scores = clip_scores(image, caption, reference, torch.tensor([0]))
    assert means(scores) == pytest.approx(
        {"CLIPScore": 1.5, "RefCLIPScore": 0}
    )  # 2 · 1.5 · -1 / 0.5 = -6 without max(cos, 0)


def test_clip_scores_of_doubles():
    image = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    scores = clip_scores(image, image, image, torch.tensor([0]))
    assert means(scores) == pytest.approx({"CLIPScore": 2.5, "RefCLIPScore": 2 * 2.5 / 3.5}, abs=1e-12)


def test_domains_are_sets_of_their_own():
    """CIDEr's document frequencies come from the domain alone."""

    quick = {"metrics": ["CIDEr"], "tokenize": list}
    references = {i: [f"a {c} dog runs", f"one {c} dog"] for i, c in enumerate(["red", "blue", "green", "red"])}
    predictions = {0: "a red dog", 1: "a cat", 2: "a green dog runs", 3: "dog"}
    domains = {0: "in-domain", 1: "out-domain", 2: "in-domain", 3: "out-domain"}
    scores = caption_table(references, predictions, domains, **quick).scores
    for domain, ids in {"in-domain": (0, 2), "out-domain": (1, 3)}.items():
        expected = caption_scores({i: references[i] for i in ids}, {i: predictions[i] for i in ids}, **quick)["CIDEr"]
        assert scores[f"{domain}/CIDEr"] == expected
    assert scores["CIDEr"] == caption_scores(references, predictions, **quick)["CIDEr"] != scores["in-domain/CIDEr"]
    assert caption_table(references, predictions, dict.fromkeys(references), **quick).scores.keys() == {
        "CIDEr", "exact_match", "mean_length", "vocabulary", "distinct_1", "distinct_2",
    }  # fmt: skip

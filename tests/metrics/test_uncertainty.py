"""Intervals and paired tests: their coverage, and every score of a resample against a recomputation from its images."""

from collections.abc import Mapping
from statistics import median

import numpy as np
import pytest
import torch

from coca_lit.data.records import Record
from coca_lit.evals.vqa import _draws
from coca_lit.metrics.captions import SCORERS, caption_scores, caption_table, tokenize_captions
from coca_lit.metrics.retrieval import similarity_ranks
from coca_lit.metrics.uncertainty import Draws, bootstrap, difference, ratios, resamples
from coca_lit.metrics.vqa import vqa_scores
from coca_lit.metrics.zeroshot import ZeroShotAccuracy, classification_scores

WORDS = ["a", "red", "blue", "dog", "cat", "runs", "sits", "on", "the", "green", "grass", "in", "snow"]
IMAGES = 40


def captions(seed: int = 0) -> tuple[dict[int, list[str]], dict[int, str]]:
    """References, one to five for each image, and predictions, one of which is perfect and one empty."""
    random = np.random.default_rng(seed)

    def write() -> str:
        return " ".join(random.choice(WORDS, size=random.integers(1, 12)))

    references = {i: [write() for _ in range(1 + i % 5)] for i in range(IMAGES)}
    return references, {i: write() for i in range(IMAGES)} | {3: references[3][0], 4: ""}


def repeated(drawn: np.ndarray, *parts: Mapping[int, object]) -> list[dict[str, object]]:
    """The images as often as they were drawn, each time under another name."""
    names = [(i, n) for i, count in enumerate(drawn) for n in range(int(count))]
    return [{f"{i}/{n}": part[i] for i, n in names} for part in parts]


def test_captions_of_a_resample() -> None:
    references, predictions = captions()
    tokens = tokenize_captions(references, predictions, list)
    (counts,) = resamples(IMAGES, draws=3)
    found = {k: v for name in ("Bleu", "ROUGE_L", "CIDEr") for k, v in SCORERS[name](*tokens).resampled(counts).items()}
    for draw, drawn in enumerate(counts):
        assert 0 in drawn
        assert max(drawn) >= 2
        expected = caption_scores(*repeated(drawn, references, predictions), ["Bleu", "ROUGE_L", "CIDEr"], list)
        assert {name: values[draw] for name, values in found.items()} == pytest.approx(expected, rel=1e-12)
    once = {k: v[0] for n in ("Bleu", "CIDEr") for k, v in SCORERS[n](*tokens).resampled(np.ones((1, IMAGES))).items()}
    assert once == pytest.approx(caption_scores(references, predictions, ["Bleu", "CIDEr"], list), rel=1e-12)


def test_draws_of_a_table_are_those_of_its_images_and_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    references, predictions = captions()
    domains = {i: "near" if i % 2 else "far" for i in references}
    scores, _, draws = caption_table(references, predictions, domains, ["Bleu", "CIDEr"], list)
    again = caption_table(references, predictions, domains, ["Bleu", "CIDEr"], list).draws
    assert scores.keys() - draws.keys() == {"vocabulary", "distinct_1", "distinct_2"}
    for name, of in draws.items():
        low, high = of.interval()
        assert of.score == pytest.approx(scores[name], rel=1e-12), name
        assert low < scores[name] < high, name
        assert (of.values == again[name].values).all()
    assert {len(of.values) for of in draws.values()} == {1000}
    assert len({draws[name].units for name in ("CIDEr", "near/CIDEr", "far/CIDEr")}) == 3
    assert draws["CIDEr"].units == draws["exact_match"].units


def test_retrieval_of_a_resample() -> None:
    generator = torch.Generator().manual_seed(0)
    image_of_text = torch.tensor([i for i in range(20) for _ in range(1 + i % 3)])
    similarity = torch.randn(20, len(image_of_text), generator=generator)
    similarity[image_of_text, torch.arange(len(image_of_text))] += 1
    ranks = similarity_ranks(similarity, image_of_text)
    (counts,) = resamples(20, draws=5)
    found = ranks.resampled((1, 5))(counts)
    for draw, drawn in enumerate(counts.astype(int)):
        of_images = [rank for i, rank in enumerate(ranks.i2t.tolist()) for _ in range(drawn[i])]
        of_texts = [r for r, i in zip(ranks.t2i.tolist(), image_of_text, strict=True) for _ in range(drawn[i])]
        for way, of in (("i2t", of_images), ("t2i", of_texts)):
            for k in (1, 5):
                assert found[f"{way}_recall@{k}"][draw] == pytest.approx(sum(rank < k for rank in of) / len(of))
            assert found[f"{way}_median_rank"][draw] == 1 + median(of)


def test_accuracy_of_a_resample() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (30,), generator=generator)
    similarity = torch.randn(30, 7, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 7)
    accuracy = ZeroShotAccuracy(resample=True)
    accuracy.update(similarity, labels, torch.arange(30))
    assert accuracy.compute() == classification_scores(similarity, labels)
    (counts,) = resamples(30)
    for draw in (0, 1, 999):
        rows = torch.from_numpy(np.repeat(np.arange(30), counts[draw].astype(int)))
        expected = classification_scores(similarity[rows], labels[rows])
        assert {n: of.values[draw] for n, of in accuracy.draws.items()} == pytest.approx(expected, rel=1e-12)


def test_questions_are_drawn_with_their_image() -> None:
    people = [["yes"] * 10, ["no"] * 10, ["2"] * 10, ["2"] * 5 + ["3"] * 5, ["red"] * 10]
    images = ["a.jpg", "a.jpg", "b.jpg", "c.jpg", "c.jpg"]
    kinds = ["yes-no", "yes-no", "number", "number", None]
    records = [Record(i, images[i], people[i], domain=kinds[i], question="?") for i in range(5)]
    answers = {"": {0: "yes", 1: "yes", 2: "2", 3: "2", 4: "blue"}, "blind": dict.fromkeys(range(5), "yes")}
    draws = _draws(records, answers)
    assert draws.keys() == {"accuracy", "yes-no/accuracy", "number/accuracy", "blind/accuracy"}
    (counts,) = resamples(3)
    for draw in range(5):
        drawn = np.array([counts[draw]["abc".index(name[0])] for name in images])
        truth, found = repeated(drawn, dict(enumerate(people)), answers[""])
        assert draws["accuracy"].values[draw] == pytest.approx(vqa_scores(truth, found)["accuracy"])


def test_resamples_are_the_same_every_time() -> None:
    first, second, other = (np.concatenate([*resamples(700, 2000, seed)]) for seed in (0, 0, 1))
    assert first.shape == (2000, 700)
    assert (first.sum(axis=1) == 700).all()
    assert (first == second).all()
    assert (first != other).any()
    assert first.var() == pytest.approx(1 - 1 / 700, abs=0.01)  # that of a multinomial count


def test_intervals_cover_the_truth() -> None:
    """Of 400 samples from a skewed distribution, the 95 % interval of the mean must hold the true mean in about 380."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        values = random.exponential(size=120)
        low, high = bootstrap(range(120), ratios({"mean": (values, None)}), draws=500)["mean"].interval()
        covered += low < 1 < high
    assert 0.92 < covered / 400 < 0.97


def test_equally_good_models_seldom_differ_and_better_ones_do() -> None:
    random = np.random.default_rng(0)
    false, right = 0, 0
    for _ in range(300):
        shared, *noise = random.normal(size=(3, 100))
        for gain in (0.0, 0.4):
            scores = shared + noise[0], shared + noise[1] + gain
            draws = [bootstrap(range(100), ratios({"s": (own, None)}), draws=500)["s"] for own in scores]
            found = difference(*draws)
            assert found.low < found.value < found.high
            false += not found.noise and not gain
            right += not found.noise and gain > 0
    assert 0.02 < false / 300 < 0.08
    # The images are the same, so what they share cancels: a test of two means with z = 0.4 / sqrt(2 / 100) = 2.8.
    assert 0.7 < right / 300 < 0.9


def test_a_test_needs_the_same_images() -> None:
    one, other = (bootstrap(ids, ratios({"s": (np.arange(3.0), None)}))["s"] for ids in ([1, 2, 3], [1, 2, 4]))
    assert difference(one, one).noise
    with pytest.raises(ValueError, match="draws of the same images"):
        difference(one, other)


def test_scores_without_a_value() -> None:
    rare = ratios({"s": (np.array([0.5, 0, 0]), np.array([1.0, 0, 0]))})  # one image has that category
    assert bootstrap(range(3), rare)["s"].interval() == (0.5, 0.5)
    nothing = Draws(np.full(1000, np.nan), np.nan, "x")
    assert np.isnan(nothing.interval()).all()
    assert difference(nothing, nothing).noise

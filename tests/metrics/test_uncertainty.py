"""Intervals and paired tests: their coverage, and every score of a resample against a recomputation from its images."""

import hashlib
from collections.abc import Mapping
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coca_lit.metrics import is_share
from coca_lit.metrics.captions import SCORERS, caption_scores, caption_table, tokenize_captions
from coca_lit.metrics.classification import ZeroShotAccuracy, classification_scores
from coca_lit.metrics.retrieval import similarity_ranks
from coca_lit.metrics.uncertainty import (
    Draws,
    Ratios,
    bootstrap,
    difference,
    digest,
    resamples,
)

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


def test_resamples_are_the_same_every_time() -> None:
    first, second, other = (np.concatenate([*resamples(700, 2000, seed)]) for seed in (0, 0, 1))
    assert first.shape == (2000, 700)
    assert (first.sum(axis=1) == 700).all()
    assert (first == second).all()
    assert (first != other).any()
    assert first.var() == pytest.approx(1 - 1 / 700, abs=0.01)  # that of a multinomial count


def test_every_image_is_drawn_as_often_as_the_others() -> None:
    (counts,) = resamples(7, draws=20_000)
    assert counts.mean(axis=0) == pytest.approx(np.ones(7), abs=0.03)


@pytest.mark.parametrize(("found", "count"), [(0, 64), (64, 64), (20, 64), (0, 1)])
def test_the_interval_of_a_share_is_wilsons(found: int, count: int) -> None:
    right = np.arange(count) < found
    low, high = bootstrap(range(count), Ratios({"top1": (right.astype(float), None)}), draws=20_000)["top1"].interval()
    expected = pytest.importorskip("scipy.stats").binomtest(found, count).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.002)
    assert 0 <= low < high <= 1


@pytest.mark.parametrize(("right", "asked"), [([2], [3]), ([0.9] * 7, [1] * 7), ([2 / 3] * 6, [1] * 6)])
def test_equal_shares_of_all_images_are_no_certainty(right: list[float], asked: list[float]) -> None:
    """Draws of equal shares scatter by rounding alone."""
    parts = {"top1": (np.array(right, dtype=float), np.array(asked, dtype=float))}
    low, high = bootstrap(range(len(right)), Ratios(parts))["top1"].interval()
    assert (low, high) == pytest.approx(wilson(sum(right) / sum(asked), len(right)))


def wilson(share: float, count: int) -> list[float]:
    """The limits (Wilson 1927): where the deviation from the share is 1.96 standard errors of the limit itself."""
    z = 1.959963984540054
    return sorted(np.roots([count + z**2, -(2 * count * share + z**2), count * share**2]))


def test_images_with_several_texts_give_a_wider_interval_than_as_many_images() -> None:
    """All four texts of an image are found, or none: 50 images say no more than 50 texts of different images."""
    found = np.arange(50) % 2 * 4.0
    of_texts = bootstrap(range(50), Ratios({"t2i_recall@1": (found, np.full(50, 4.0))}), draws=20_000)
    expected = pytest.importorskip("scipy.stats").binomtest(25, 50).proportion_ci(method="wilson")
    assert of_texts["t2i_recall@1"].interval() == pytest.approx((expected.low, expected.high), abs=0.002)


def test_other_intervals_are_centred_on_the_score_and_within_the_draws() -> None:
    values = np.linspace(0, 10, 1001)
    assert Draws(values, 5.1, "x").interval() == pytest.approx((0.35, 9.85))
    assert Draws(np.array([1.0] * 990 + [9.0] * 10), 1.0, "x").interval()[0] == 1  # no rank is below 1
    low, high = Draws(np.array([-1.0] * 20 + [0.0] * 979 + [1.0]), 0.0, "x").interval()  # the mean is below the score
    assert (low, high) == pytest.approx((0, 0.019))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_interval_leaves_what_is_possible(data: st.DataObject) -> None:
    """Shares, also of images with several texts, and their differences; ranks; other means of positive numbers."""
    images = data.draw(st.integers(1, 70))
    texts = np.array(data.draw(st.lists(st.integers(1, 5), min_size=images, max_size=images)), dtype=np.float64)
    models: list[dict[str, Draws]] = []
    for model in range(2):
        rate = data.draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
        random = np.random.default_rng([model, images])
        found = random.binomial(texts.astype(int), rate).astype(np.float64)
        owner = torch.arange(images).repeat_interleave(torch.from_numpy(texts.astype(int)))
        near = torch.from_numpy(random.normal(size=(images, len(owner))))
        near[owner, torch.arange(len(owner))] += 4 * rate
        shares = Ratios({"own_recall@1": (found, texts), "exact_match": ((found > 0).astype(float), None)})
        means = Ratios({"CIDEr": (found, None), "object_recall": (found, found + 1)})
        models.append(bootstrap(range(images), shares, means, similarity_ranks(near, owner).resampled(), draws=60))
    for score, draws in models[0].items():
        low, high = draws.interval()
        if np.ptp(draws.values) < 1e-9 and not is_share(score):
            continue
        least, most = (1, images * 5) if score.endswith("rank") else (0, 1 if is_share(score) else 5)
        assert least <= low <= draws.score + 1e-9, score
        assert draws.score - 1e-9 <= high <= most, score
        gap = difference(draws, models[1][score])
        assert gap.low <= gap.value <= gap.high or np.ptp(models[1][score].values - draws.values) < 1e-9
        if is_share(score):
            assert low < high
            assert -1 <= gap.low < gap.high <= 1


def test_the_difference_of_equal_answers_is_not_certain() -> None:
    """0 of 64 images on which two models differ: Wilson's interval of that share ends at 5.7 %."""
    right = np.arange(64) < 20
    draws = bootstrap(range(64), Ratios({"top1": (right.astype(float), None)}))["top1"]
    expected = pytest.importorskip("scipy.stats").binomtest(0, 64).proportion_ci(method="wilson").high
    found = difference(draws, draws)
    assert (found.low, found.high, found.p) == pytest.approx((-expected, expected, 1))


def test_a_share_of_some_images_is_as_uncertain_as_these_alone() -> None:
    """2 of 1,000 images are of a kind, and both are right."""
    of = (np.arange(1000) < 2).astype(float)
    found, alone = (bootstrap(range(n), Ratios({"accuracy": (of[:n], of[:n])}))["accuracy"] for n in (1000, 2))
    assert found.interval() == pytest.approx(alone.interval())
    assert found.interval()[0] == pytest.approx(0.342, abs=0.001)  # Wilson's of 2 of 2


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_few_images_that_all_agree_prove_no_more_than_as_many_coins(count: int) -> None:
    """Two-sided sign test."""
    truth = pytest.importorskip("scipy.stats").binomtest(count, count).pvalue
    gains = np.random.default_rng(count).uniform(1, 1.2, count)
    for score, gain in (("accuracy", np.ones(count)), ("CIDEr", np.ones(count)), ("CIDEr", gains)):
        worse, better = (bootstrap(range(count), Ratios({score: (own, None)}))[score] for own in (0 * gain, gain))
        assert difference(worse, better).p == pytest.approx(truth)


def test_intervals_cover_the_truth() -> None:
    """Of 400 samples from a skewed distribution, the 95 % interval of the mean must hold the true mean in about 380."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        values = random.exponential(size=120)
        low, high = bootstrap(range(120), Ratios({"mean": (values, None)}), draws=500)["mean"].interval()
        covered += low < 1 < high
    assert 0.92 < covered / 400 < 0.97


def test_equally_good_models_seldom_differ_and_better_ones_do() -> None:
    random = np.random.default_rng(0)
    false, right = 0, 0
    for _ in range(300):
        shared, *noise = random.normal(size=(3, 100))
        for gain in (0.0, 0.4):
            scores = shared + noise[0], shared + noise[1] + gain
            draws = [bootstrap(range(100), Ratios({"s": (own, None)}), draws=500)["s"] for own in scores]
            found = difference(*draws)
            assert found.low < found.value < found.high
            false += not found.noise and not gain
            right += not found.noise and gain > 0
    assert 0.02 < false / 300 < 0.08
    # The images are the same, so what they share cancels: a test of two means with z = 0.4 / sqrt(2 / 100) = 2.8.
    assert 0.7 < right / 300 < 0.9


def test_a_test_needs_the_same_images() -> None:
    one, other = (bootstrap(ids, Ratios({"s": (np.arange(3.0), None)}))["s"] for ids in ([1, 2, 3], [1, 2, 4]))
    assert difference(one, one).noise
    with pytest.raises(ValueError, match="images"):
        difference(one, other)


def test_scores_without_a_value() -> None:
    rare = Ratios({"s": (np.array([0.5, 0, 0]), np.array([1.0, 0, 0]))})  # one image has that category
    assert np.isnan(bootstrap(range(3), rare)["s"].interval()).all()
    first, second = (np.random.default_rng(seed).normal(mean, 1, size=1000) for seed, mean in ((0, 0.0), (1, 9.0)))
    whole = difference(Draws(first, 0.0, "x"), Draws(second, 9.0, "x"))
    first[7] = np.nan  # one resample without that category
    some = difference(Draws(first, 0.0, "x"), Draws(second, 9.0, "x"))
    assert not some.noise
    assert some == pytest.approx(whole, abs=0.02)
    nothing = Draws(np.full(1000, np.nan), np.nan, "x")
    assert np.isnan(nothing.interval()).all()
    assert difference(nothing, nothing).noise


def test_draws_that_do_not_scatter_give_no_interval() -> None:
    """As CIDEr where no caption of seven has a word of its references."""
    draws = Draws(np.zeros(1000), 0.0, "x")
    assert np.isnan(draws.interval()).all()
    same = difference(draws, draws)
    assert (same.value, same.noise) == (0.0, True)
    assert np.isnan([same.low, same.high]).all()


def test_digest() -> None:
    assert digest(iter([1, "a"])) == hashlib.sha256(b'[1, "a"]').hexdigest()[:16]
    assert digest(["a", 1]) != digest([1, "a"])

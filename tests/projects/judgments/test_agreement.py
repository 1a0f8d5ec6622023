"""Scores of scores: pycocoevalcap driven by hand and scipy are the truth."""

import os
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

kendalltau = pytest.importorskip("scipy.stats").kendalltau

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from coca_lit.metrics.java.runtime import ptb_tokenize
from coca_lit.metrics.uncertainty import DRAWS, difference, resamples
from coca_lit.projects.judgments.agreement import agreement, kendall, mixtures, reference_scores
from coca_lit.projects.judgments.judged import Candidate, Grade, Judged, Preference, read_judgments
from coca_lit.projects.rewards.cider import CiderD
from helpers.shared_data import SHARED
from helpers.slow import slow

JUDGMENTS = SHARED / "judgments"
published = pytest.mark.skipif(not JUDGMENTS.is_dir(), reason="shared judgements not present")


def judged(images: int = 20, seed: int = 0) -> tuple[Judged, dict[str, np.ndarray]]:
    """Random candidates, grades with ties, preferences, and two scores, one with ties."""
    rng = np.random.default_rng(seed)
    candidates = [Candidate(str(image), f"caption {i}") for image in range(images) for i in range(rng.integers(1, 6))]
    grades = [Grade(n, float(rng.integers(1, 5)), f"judge {j}") for n in range(len(candidates)) for j in range(3)]
    pairs = [
        Preference(n, n + 1, "HC" if n % 3 else "MM")
        for n, (one, two) in enumerate(pairwise(candidates))
        if one.image == two.image
    ]
    truth = np.array([np.mean([g.value for g in grades if g.candidate == n]) for n in range(len(candidates))])
    scores = {"noisy": truth + rng.normal(size=len(truth)), "tied": rng.integers(0, 4, len(truth)).astype(float)}
    return Judged("x", candidates, {}, grades, pairs), scores


def test_taus_and_their_draws_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    unit, grades = rng.integers(0, 12, 90), rng.integers(1, 5, 90).astype(float)
    scores = {"plain": rng.normal(size=90), "tied": rng.integers(0, 3, 90).astype(float), "constant": np.ones(90)}
    resampled = kendall(unit, scores, grades)
    for counts in (np.ones((1, 12)), *resamples(12, draws=25)):
        found = resampled(counts)
        for draw, row in enumerate(counts):
            taken = np.concatenate([np.repeat(np.flatnonzero(unit == i), int(n)) for i, n in enumerate(row)])
            for name, values in scores.items():
                for variant in "bc":
                    truth = kendalltau(values[taken], grades[taken], variant=variant).statistic
                    assert found[f"tau_{variant} {name}"][draw] == pytest.approx(truth, abs=1e-12, nan_ok=True)


def test_an_image_is_drawn_with_all_its_captions() -> None:
    """With one candidate an image, an image is a point; grades of three judges are three points and no more certain."""
    everything, scores = judged(40)
    by = agreement(everything, scores).by
    assert set(by) == {"tau_b", "tau_c", "accuracy", "HC accuracy", "MM accuracy"}
    one = everything._replace(grades=[grade for grade in everything.grades if grade.judge == "judge 0"])
    widths = [np.ptp(agreement(own, scores).by["tau_c"]["noisy"].interval()) for own in (everything, one)]
    assert widths[0] > 0.6 * widths[1]
    for draws in (draws for of in by.values() for draws in of.values()):
        assert len(draws.values) == DRAWS
        low, high = draws.interval()
        assert -1 <= low <= draws.score <= high <= 1
    gap = difference(by["tau_c"]["noisy"], by["tau_c"]["tied"])
    assert gap.value < 0
    assert not gap.noise


def test_pairs_by_hand() -> None:
    everything, _ = judged()
    candidates = [Candidate("a", str(i)) for i in range(4)]
    of = everything._replace(
        candidates=candidates, grades=[], preferences=[Preference(0, 1, "HC"), Preference(2, 3, "MM"), Preference(3, 1)]
    )
    by = agreement(of, {"score": np.array([2.0, 1.0, 1.0, 1.0])}).by  # right, a tie, a tie
    assert {measure: draws["score"].score for measure, draws in by.items()} == {
        "accuracy": pytest.approx(1 / 3),
        "HC accuracy": 1.0,
        "MM accuracy": 0.0,
    }


def test_an_accuracy_is_of_the_images_that_have_a_pair_of_its_kind() -> None:
    """Where all are right, the width of an interval depends on their number alone."""
    found, scores = judged(30)
    every = {p for p in found.preferences if p.kind == "HC"}
    images = {found.candidates[p.better].image for p in every}
    assert 0 < len(images) < 30
    assert agreement(found, scores).by["HC accuracy"]["noisy"].trials == len(images)


def test_people_with_each_other() -> None:
    """For each grade, the mean of the other judges' grades of the same caption."""
    everything, scores = judged()
    by_candidate = [[g.value for g in everything.grades if g.candidate == n] for n in range(len(everything.candidates))]
    pairs = [((sum(own) - grade) / 2, grade) for own in by_candidate for grade in own]
    people = agreement(everything, scores).people
    for variant in "bc":
        assert people[f"tau_{variant}"].score == pytest.approx(
            kendalltau(*zip(*pairs, strict=True), variant=variant)[0]
        )
    lone = everything._replace(grades=[grade for grade in everything.grades if grade.judge == "judge 0"])
    assert agreement(lone, scores).people == {}
    votes = {n: (n % 3, 2) for n in range(len(everything.candidates))}
    assert 0 < agreement(lone._replace(votes=votes), scores).people["tau_b"].interval()[1] < 1


def test_weights_of_mixtures_come_from_the_other_half() -> None:
    everything, scores = judged(60)
    scores = {**scores, "worse": -scores["noisy"]}
    half, found, shares = mixtures(everything, scores, [("noisy", "tied"), ("worse", "noisy")])
    assert len({c.image for c in half.candidates}) == 30
    assert all(len(values) == len(half.candidates) for values in found.values())
    assert shares["worse + noisy"] > 0.5  # the first share with which the better one decides
    assert shares["noisy + tied"] < 0.5
    assert agreement(half, found).by["tau_b"]["worse + noisy"].score == pytest.approx(
        agreement(half, found).by["tau_b"]["noisy"].score
    )
    changed = [g._replace(value=1.0) if half_of(half, everything, g) else g for g in everything.grades]
    assert (
        mixtures(everything._replace(grades=changed), scores, [("noisy", "tied")])[2]["noisy + tied"]
        == shares["noisy + tied"]
    )


def half_of(half: Judged, everything: Judged, grade: Grade) -> bool:
    return everything.candidates[grade.candidate] in half.candidates


def test_a_score_that_is_no_number_is_refused() -> None:
    everything, scores = judged()
    with pytest.raises(ValueError, match="broken is NaN"):
        agreement(everything, {**scores, "broken": np.full(len(everything.candidates), np.nan)})


def test_cider_without_its_defences() -> None:
    """A caption that repeats its words gains, and a longer one loses nothing by its length."""
    references = {0: [["a", "dog", "runs"]], 1: [["a", "cat"]], 2: [["the", "bird", "sings", "now"]]}
    plain, defended = (CiderD(references, defended=way) for way in (False, True))
    assert plain(0, [["dog", "runs"]]) > defended(0, [["dog", "runs"]])
    repeated = plain(0, [["dog", "dog", "dog", "runs"]])[0]
    assert repeated > defended(0, [["dog", "dog", "dog", "runs"]])[0]
    assert plain(0, [["a", "dog", "runs"]])[0] == pytest.approx(defended(0, [["a", "dog", "runs"]])[0])


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Judged]:
    """The judgements of 60 photos; SPICE is not run."""
    monkeypatch.setenv("COCA_SPICE_JARS", os.devnull)

    def read(name: str) -> Judged:
        everything = read_judgments(JUDGMENTS / name)
        return everything.of(sorted({c.image for c in everything.candidates})[:60])

    return read


@published
@pytest.mark.parametrize("name", ["ExpertAnnotations.txt", *slow("CrowdFlowerAnnotations.txt")])
def test_equal_to_pycocoevalcap_by_hand(
    few: Callable[[str], Judged], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From the published files, with the rules of Hessel et al. 2021, and every grade a point of its own."""
    texts = dict(line.rstrip("\n").split("\t") for line in (JUDGMENTS / "Flickr8k.token.txt").open())
    texts = {id: " ".join(text.split()) for id, text in texts.items()}
    ours = few(name)
    images = {candidate.image for candidate in ours.candidates}
    rows = [line.split("\t") for line in (JUDGMENTS / name).read_text().splitlines()]
    rows = [row for row in rows if row[0].removesuffix(".jpg") in images]
    own = {image: [text for id, text in texts.items() if id.startswith(f"{image}.jpg#")] for image in images}
    crowd = name.startswith("Crowd")
    points: list[tuple[str, str, float]] = []
    for image, id, *grades in rows:
        image = image.removesuffix(".jpg")
        if crowd:
            points.append((image, texts[id], float(grades[0])))
        elif texts[id] not in own[image]:
            points += [(image, texts[id], float(grade)) for grade in grades]
    if crowd:
        for image, text, _ in points:
            own[image] = [other for other in own[image] if other != text]
    pairs = list(dict.fromkeys((image, text) for image, text, _ in points))
    everything = [*(text for _, text in pairs), *(text for image, _ in pairs for text in own[image])]
    tokens = dict(zip(everything, ptb_tokenize(everything), strict=True))
    references = {n: [tokens[text] for text in own[image]] for n, (image, _) in enumerate(pairs)}
    captions = {n: [tokens[text]] for n, (_, text) in enumerate(pairs)}
    truth = {"CIDEr": Cider().compute_score(references, captions)[1]}
    truth["ROUGE_L"] = Rouge().compute_score(references, captions)[1]
    bleu = Bleu(4).compute_score(references, captions, verbose=0)[1]
    truth |= {"Bleu_1": bleu[0], "Bleu_4": bleu[3]}

    monkeypatch.setattr("coca_lit.projects.judgments.agreement.warm_up", lambda: None)
    monkeypatch.setattr("coca_lit.projects.judgments.agreement.shared_meteor", without_java)
    scores, not_run = reference_scores(ours)
    assert not_run == {"METEOR": "no METEOR", "SPICE": not_run["SPICE"]}
    found = agreement(ours, scores)
    number = {pair: n for n, pair in enumerate(pairs)}
    grades = [grade for _, _, grade in points]
    for score, values in truth.items():
        for variant in "bc":
            tau = kendalltau([values[number[image, text]] for image, text, _ in points], grades, variant=variant)
            assert found.by[f"tau_{variant}"][score].score == pytest.approx(tau.statistic, abs=1e-9)


def without_java() -> None:
    raise FileNotFoundError("no METEOR")


@published
@pytest.mark.slow
def test_meteor_of_single_captions(few: Callable[[str], Judged]) -> None:
    """Equal to that of each caption scored by itself."""
    from coca_lit.metrics.captions import caption_scores

    ours = few("ExpertAnnotations.txt")
    scores, _ = reference_scores(ours)
    for number in (0, 50):
        image, caption = ours.candidates[number]
        alone = caption_scores({0: list(ours.references[image])}, {0: caption}, ["METEOR"])
        assert scores["METEOR"][number] == pytest.approx(alone["METEOR"], abs=1e-12)

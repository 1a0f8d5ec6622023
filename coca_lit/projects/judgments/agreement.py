"""How well scores of captions agree with people: Kendall's tau with grades, accuracy on pairs, and their uncertainty.

Images are drawn with replacement, each with its candidates and all their grades; a score itself stays as it is.
Shapes: I images, C candidates, P grades, D draws.
"""

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from coca_lit.errors import DataError
from coca_lit.metrics.java.meteor import shared_meteor, warm_up
from coca_lit.metrics.java.runtime import JavaError, ptb_tokenize
from coca_lit.metrics.java.spice import shared_spice
from coca_lit.metrics.uncertainty import Draws, Ratios, Resampled, bootstrap, difference
from coca_lit.progress import ProgressBar
from coca_lit.projects.judgments.judged import Judged, read_judgments
from coca_lit.projects.rewards.cider import CiderD
from coca_lit.reading import printable
from coca_lit.runs.scores import aligned, score_name

try:
    from scipy.sparse import csr_array
    from scipy.stats import kendalltau
except ModuleNotFoundError as error:
    raise DataError("judgments need an optional package: pip install 'coca_lit[statistics]'") from error

MAX_UNITS = 4096  # drawn; of more images, some are drawn together
ROWS = 256  # grades that are compared with all others at a time
AT_ONCE = 100  # draws whose counts of values are in memory
SHARES = np.linspace(0, 1, 21)  # of the second score in a mixture
TAUS = {"tau_b": "Kendall's tau-b", "tau_c": "Kendall's tau-c"}
USUAL = "CIDEr"  # with which other scores are compared

Scores = dict[str, np.ndarray]  # score -> a value for each candidate
Measured = dict[str, Draws]  # score -> its agreement with people


class Agreement(NamedTuple):
    """How well scores agree with people.

    Attributes:
        by: measure -> score -> its agreement: "tau_b" and "tau_c" with grades; with preferences "accuracy", and
            "HC accuracy" of the kind HC.
        people: measure -> agreement of judges with each other, where they can be told apart.
    """

    by: dict[str, Measured]
    people: Measured


def agreement(judged: Judged, scores: Mapping[str, np.ndarray]) -> Agreement:
    """Of scores (C,) of all candidates with the grades, each a point of its own, and with the preferences.

    Raises:
        ValueError: a score is NaN.
    """
    if wrong := [name for name, values in scores.items() if np.isnan(values).any()]:
        raise ValueError(f"the score {wrong[0]} is NaN for a candidate, so it cannot be ranked")
    images = list(dict.fromkeys(candidate.image for candidate in judged.candidates))
    place = {image: number % MAX_UNITS for number, image in enumerate(images)}
    units = images[:MAX_UNITS]
    by: dict[str, Measured] = {}
    people: Measured = {}
    if judged.grades:
        candidate = np.array([grade.candidate for grade in judged.grades])
        unit = np.array([place[own.image] for own in judged.candidates])[candidate]
        grade = np.array([grade.value for grade in judged.grades])
        found = bootstrap(units, kendall(unit, {name: values[candidate] for name, values in scores.items()}, grade))
        by |= {tau: {name: found[f"{tau} {name}"] for name in scores} for tau in TAUS}
        if (peers := _peers(judged, place)) is not None:
            unit, others, grade = peers
            found = bootstrap(units, kendall(unit, {"people": others}, grade))
            people = {tau: found[f"{tau} people"] for tau in TAUS}
    if judged.preferences:
        kinds = ["", *sorted({f"{p.kind} " for p in judged.preferences if p.kind is not None})]
        found = bootstrap(units, _accuracies(judged, scores, place, kinds))
        by |= {f"{kind}accuracy": {name: found[f"{name} {kind}accuracy"] for name in scores} for kind in kinds}
    return Agreement(by, people)


def mixtures(
    judged: Judged, scores: Scores, pairs: Sequence[tuple[str, str]]
) -> tuple[Judged, Scores, dict[str, float]]:
    """Sums of two scores, each divided by its standard deviation, weighted so that they agree best with people on one
    half of the images: tau-c with grades, else accuracy on pairs.

    Returns the other half, all scores and mixtures of it ("CIDEr + CLIPScore"), and the share of each second score.
    """
    images = sorted({candidate.image for candidate in judged.candidates})
    train = set(random.Random(0).sample(images, len(images) // 2))
    held_out = judged.of(set(images) - train)
    learned = judged.of(train)
    of_train = np.array([candidate.image in train for candidate in judged.candidates])
    found = {name: values[~of_train] for name, values in scores.items()}
    shares: dict[str, float] = {}
    for first, second in pairs:
        parts = [scores[name] / (scores[name][of_train].std() or 1.0) for name in (first, second)]
        reached = [_quality(learned, ((1 - w) * parts[0] + w * parts[1])[of_train]) for w in SHARES]
        name = f"{first} + {second}"
        shares[name] = float(SHARES[int(np.argmax(reached))])
        found[name] = ((1 - shares[name]) * parts[0] + shares[name] * parts[1])[~of_train]
    return held_out, found, shares


def _quality(judged: Judged, values: np.ndarray) -> float:
    if judged.grades:
        candidate = [grade.candidate for grade in judged.grades]
        tau = kendalltau(values[candidate], [grade.value for grade in judged.grades], variant="c").statistic
        return -1.0 if math.isnan(tau) else float(tau)
    return float(np.mean([values[p.better] > values[p.worse] for p in judged.preferences]))


def kendall(unit: np.ndarray, scores: Mapping[str, np.ndarray], grades: np.ndarray) -> Resampled:
    """Kendall's tau-b and tau-c of scores (P,) with grades (P,), as `scipy.stats.kendalltau` has them, for points whose
    images (P,), numbered from 0, are drawn with replacement: what is drawn twice counts as two points.

    Pairs are counted once, by their two images: a draw is then a product of its counts with that matrix.
    """
    order = np.argsort(unit, kind="stable")
    unit, grades = unit[order], grades[order]
    scores = {name: values[order] for name, values in scores.items()}
    present, starts = np.unique(unit, return_index=True)
    count = int(unit.max()) + 1
    concordance = {name: np.zeros((count, count)) for name in scores}
    for start in range(0, len(unit), ROWS):
        rows = slice(start, start + ROWS)
        of_grades = _signs(grades, rows)
        for name, values in scores.items():
            by_image = np.add.reduceat(_signs(values, rows) * of_grades, starts, axis=1, dtype=np.int64)
            part = np.zeros((len(by_image), count))
            part[:, present] = by_image
            np.add.at(concordance[name], unit[rows], part)
    of_grade = _values(unit, grades)
    of_scores = {name: _values(unit, values) for name, values in scores.items()}
    points = np.bincount(unit, minlength=count)

    def resampled(counts: np.ndarray) -> dict[str, np.ndarray]:
        counts = counts[:, :count]
        pairs = (counts @ points) ** 2  # (D,) ordered, each point with itself included
        tied, kinds = _ties(of_grade, counts)
        found: dict[str, np.ndarray] = {}
        for name, matrix in concordance.items():
            surplus = ((counts @ matrix) * counts).sum(axis=1)  # concordant minus discordant ordered pairs
            own_tied, own_kinds = _ties(of_scores[name], counts)
            fewest = np.minimum(kinds, own_kinds)
            with np.errstate(divide="ignore", invalid="ignore"):
                found[f"tau_b {name}"] = surplus / np.sqrt((pairs - tied) * (pairs - own_tied))
                found[f"tau_c {name}"] = surplus / (pairs * (fewest - 1) / fewest)
        return found

    return resampled


def _signs(values: np.ndarray, rows: slice) -> np.ndarray:
    """Whether (rows, P) the first value is above (1) or below (-1) the second."""
    own = values[rows, None]
    return (own > values).view(np.int8) - (own < values).view(np.int8)


def _values(unit: np.ndarray, values: np.ndarray) -> csr_array:
    """How many points (V, I) with each of the V different values an image has."""
    _, value = np.unique(values, return_inverse=True)
    return csr_array((np.ones(len(value)), (value, unit)), shape=(int(value.max()) + 1, int(unit.max()) + 1))


def _ties(values: csr_array, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ordered pairs of equal values (D,), each point with itself included, and the number of different values (D,)."""
    parts = [values @ counts[start : start + AT_ONCE].T for start in range(0, len(counts), AT_ONCE)]  # (V, D)
    return (
        np.concatenate([(part**2).sum(axis=0) for part in parts]),
        np.concatenate([(part > 0).sum(axis=0) for part in parts]),
    )


def _peers(judged: Judged, place: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Units, scores and grades with people in place of a score: for each grade the mean of the other judges' grades of
    that candidate; of a crowd, one half of its votes for the other half. None if no candidate has two judges.
    """
    unit = [place[own.image] for own in judged.candidates]
    rows: list[tuple[int, float, float]] = []
    if judged.votes:
        drawn = random.Random(0)
        for candidate, (yes, no) in judged.votes.items():
            votes = drawn.sample([1] * yes + [0] * no, yes + no)
            first, second = votes[: len(votes) // 2], votes[len(votes) // 2 :]
            if first:
                rows.append((unit[candidate], sum(first) / len(first), sum(second) / len(second)))
    else:
        panels: dict[int, list[float]] = defaultdict(list)
        for grade in judged.grades:
            panels[grade.candidate].append(grade.value)
        for candidate, panel in panels.items():
            if len(panel) > 1:
                rows += [(unit[candidate], (sum(panel) - own) / (len(panel) - 1), own) for own in panel]
    if not rows:
        return None
    units, others, own = (np.array(values) for values in zip(*rows, strict=True))
    return units, others, own


def _accuracies(
    judged: Judged, scores: Mapping[str, np.ndarray], place: Mapping[str, int], kinds: Sequence[str]
) -> Ratios:
    """Shares of the preferences whose better caption has the higher score; a tie is wrong."""
    better, worse = (np.array([getattr(p, side) for p in judged.preferences]) for side in ("better", "worse"))
    unit = np.array([place[judged.candidates[p.better].image] for p in judged.preferences])
    of_kind = {kind: np.array([not kind or f"{p.kind} " == kind for p in judged.preferences]) for kind in kinds}
    right = {name: values[better] > values[worse] for name, values in scores.items()}

    def of_images(counted: np.ndarray) -> np.ndarray:
        return np.bincount(unit, weights=counted, minlength=max(place.values()) + 1)

    parts = {
        f"{name} {kind}accuracy": (of_images(own & values), of_images(own))
        for kind, own in of_kind.items()
        for name, values in right.items()
    }
    return Ratios(parts)


# Scores of single captions: each candidate alone against the references of its image


def reference_scores(judged: Judged) -> tuple[Scores, dict[str, str]]:
    """BLEU-1 and -4, ROUGE-L, METEOR, CIDEr, CIDEr without its defences, and SPICE (C,) of all candidates, and why some
    could not be computed. "CIDEr" is that of the official code, which the paper calls CIDEr-D.

    Raises:
        JavaError: the tokenizer fails.
        FileNotFoundError: there is no Java.
    """
    warm_up()
    texts = list(
        dict.fromkeys([c.caption for c in judged.candidates] + [t for r in judged.references.values() for t in r])
    )
    tokens = dict(zip(texts, ptb_tokenize(texts), strict=True))
    references = [[tokens[text] for text in judged.references[candidate.image]] for candidate in judged.candidates]
    captions = [tokens[candidate.caption] for candidate in judged.candidates]
    numbered = dict(enumerate(references))
    hypotheses = {number: [text] for number, text in enumerate(captions)}
    _, of_order = Bleu(4).compute_score(numbered, hypotheses, verbose=0)
    scores: Scores = {"Bleu_1": np.array(of_order[0]), "Bleu_4": np.array(of_order[3])}
    scores["ROUGE_L"] = np.array(Rouge().compute_score(numbered, hypotheses)[1])
    not_run: dict[str, str] = {}
    try:
        scores["METEOR"] = shared_meteor().score(references, captions).captions
    except (JavaError, FileNotFoundError) as error:
        not_run["METEOR"] = str(error)
    scores["CIDEr"] = np.array(Cider().compute_score(numbered, hypotheses)[1])
    plain = CiderD({n: [text.split() for text in own] for n, own in numbered.items()}, defended=False)
    scores["CIDEr_plain"] = np.array([plain(number, [text.split()])[0] for number, text in enumerate(captions)])
    try:
        with ProgressBar("SPICE", "captions") as bar:
            scores["SPICE"] = shared_spice().score(references, captions, bar.reach)["SPICE"]
    except (RuntimeError, FileNotFoundError) as error:
        not_run["SPICE"] = str(error)
    return scores, not_run


# `coca-score --judgments`: a table of scores and how well people agree with them


def judge_files(files: Sequence[Path], captions: Path | None = None) -> dict[str, float]:
    """Prints how well scores against references agree with the judgements of each file; returns the numbers as
    "FILE/tau_b_CIDEr".

    Raises:
        DataError: see `read_judgments`.
    """
    everything = [read_judgments(path, captions) for path in files]  # mistakes first: scoring takes minutes
    if len({judged.name for judged in everything}) < len(everything):
        raise DataError("two files of judgements have the same name, by which their scores are told apart: rename one")
    scores: dict[str, float] = {}
    for judged in everything:
        images = len({candidate.image for candidate in judged.candidates})
        parts = [f"{judged.name}: {len(judged.candidates):,} captions of {images:,} images"]
        if judged.grades:
            judges = len({grade.judge for grade in judged.grades})
            several = f" of {judges} judges, each a point of its own (mean grades give other numbers)"
            parts.append(f"{len(judged.grades):,} grades" + (several if judges > 1 else ""))
        if judged.preferences:
            parts.append(f"{len(judged.preferences):,} pairs of which people prefer one")
        if judged.left_out:
            parts.append(f"{judged.left_out:,} left out: {judged.why_left_out}")
        print(printable("; ".join(parts)), flush=True)
        found, not_run = reference_scores(judged)
        of = agreement(judged, found)
        for measure in of.by:
            for line in _table(of, measure):
                print(line)
        for name, reason in not_run.items():
            print(printable(f"{name} not run: {reason}"))
        for measure, by_score in of.by.items():
            scores |= {f"{judged.name}/{measure}_{name}": draws.score for name, draws in by_score.items()}
        print(flush=True)
    return scores


def _table(of: Agreement, measure: str) -> list[str]:
    """A line for each score, with its interval and its difference from CIDEr."""
    found = of.by[measure]
    accuracy = f"accuracy on pairs {measure.removesuffix('accuracy')}".strip()
    title = f"{TAUS[measure]}, times 100" if measure in TAUS else f"{accuracy}, %"
    rows = [(title, "", "", f"minus {USUAL}", "", "p")]
    for name, draws in found.items():
        row = (score_name(name).removesuffix(", %"), *_cells(draws))
        if name == USUAL:
            rows.append((*row, "", "", ""))
            continue
        gap = difference(found[USUAL], draws)
        rows.append((*row, f"{100 * gap.value:+.1f}", f"[{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]", f"{gap.p:.3f}"))
    if measure in of.people:
        rows.append(("people with each other", *_cells(of.people[measure]), "", "", ""))
    return ["", *(f"  {line}" for line in aligned(rows, right=range(1, len(rows[0]))))]


def _cells(draws: Draws) -> tuple[str, str]:
    low, high = draws.interval()
    return f"{100 * draws.score:.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]"

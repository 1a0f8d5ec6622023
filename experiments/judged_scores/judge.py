"""Which scores of captions do people agree with?

    python -m experiments.judged_scores.judge experts FOLDER [MODEL…]
    python -m experiments.judged_scores.judge crowd FOLDER [MODEL…]

FOLDER holds ExpertAnnotations.txt, CrowdFlowerAnnotations.txt and Flickr8k.token.txt, and the photos in images/.
A model is `photos`, a run folder or a checkpoint; three runs that are named VARIANT_seedN are three seeds. SPICE is
scored if its jars are there. Rows in the CSV replace earlier ones of the same judgements and model: a score's agreement
with people, its interval, and its difference from CIDEr on the same draws.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import torch

from coca_lit.evals import Settings
from coca_lit.files import write_json
from coca_lit.metrics.uncertainty import Draws, Ratios, bootstrap, difference
from coca_lit.projects.judgments.agreement import Agreement, Scores, agreement, mixtures, reference_scores
from coca_lit.projects.judgments.evaluation import MIXTURES, model_scores
from coca_lit.projects.judgments.judged import Grade, Judged, read_judgments
from coca_lit.reading import read_json
from coca_lit.runs.run_folder import environment
from coca_lit.weights.load import load_dual_encoder
from experiments.study import Row, replace_rows

FILES = {"experts": "ExpertAnnotations.txt", "crowd": "CrowdFlowerAnnotations.txt"}
PUBLISHED = {  # Hessel et al. 2021, arXiv 2104.08718: tau-c of the experts and tau-b of the crowd, on all 1,000 photos
    "experts": {
        **{"Bleu_1": 32.3, "Bleu_4": 30.8, "ROUGE_L": 32.3, "METEOR": 41.8, "CIDEr": 43.9, "SPICE": 44.9},
        **{"CLIPScore": 51.2, "RefCLIPScore": 53.0},
    },
    "crowd": {"Bleu_4": 16.9, "ROUGE_L": 19.9, "METEOR": 22.2, "CIDEr": 24.6, "SPICE": 24.4, "CLIPScore": 34.4},
}
MEASURES = ("tau_b", "tau_c")
BASE = "CIDEr"
BINS = (0, 5, 10, 20, 40, 80, np.inf)  # of the difference of two captions' CIDEr, times 100
ALL, HALF = "all photos", "half of the photos"


def row(data: str, model: str, images: str, measure: str, score: str, draws: Draws, base: Draws | None = None) -> Row:
    """A row of the CSV. Numbers are times 100."""
    low, high = draws.interval()
    found = {"value": draws.score, "low": low, "high": high}
    p = ""
    if base is not None:
        gap = difference(base, draws)
        found |= {"minus_cider": gap.value, "minus_low": gap.low, "minus_high": gap.high}
        p = f"{gap.p:.3f}"
    numbers = {name: f"{100 * value:.3f}" for name, value in found.items()}
    about = {"judgments": data, "model": model, "images": images, "measure": measure, "score": score}
    return about | numbers | {"p": p}


def rows_of(data: str, model: str, images: str, found: Agreement, scores: Mapping[str, object]) -> Iterator[Row]:
    """A row for each of the scores and each measure."""
    for measure in MEASURES:
        of = found.by[measure]
        for score in scores:
            yield row(data, model, images, measure, score, of[score], None if score == BASE else of[BASE])


def against_references(data: str, judged: Judged, scores: Scores) -> Iterator[Row]:
    """Scores that need no model, people themselves, noise of judges, and what a difference of CIDEr means."""
    found = agreement(judged, scores)
    yield from rows_of(data, "", ALL, found, scores)
    for measure, draws in found.people.items():
        yield row(data, "", ALL, measure, "people", draws)
    if data != "experts":
        return
    judges = sorted({grade.judge for grade in judged.grades})
    for count in range(1, len(judges) + 1):
        for panel in combinations(judges, count):
            of = agreement(mean_grades(judged, panel), {BASE: scores[BASE]})
            for measure in MEASURES:
                yield row(data, "", ALL, f"{measure}, mean grade of {count}", BASE, of.by[measure][BASE])
    yield from gained(judged, scores)


def mean_grades(judged: Judged, panel: tuple[str, ...]) -> Judged:
    """One grade for each candidate: the mean over some of the judges."""
    values: dict[int, list[float]] = {}
    for grade in judged.grades:
        if grade.judge in panel:
            values.setdefault(grade.candidate, []).append(grade.value)
    return judged._replace(grades=[Grade(n, sum(own) / len(own), "panel") for n, own in values.items()])


def gained(judged: Judged, scores: Scores) -> Iterator[Row]:
    """Of two captions of a photo, how often do the experts' mean grades prefer the one with the higher CIDEr, by the
    difference in CIDEr? And how much higher is its mean grade? Pairs with equal mean grades count a half.
    """
    everyone = mean_grades(judged, tuple({grade.judge for grade in judged.grades}))
    grade = {own.candidate: own.value for own in everyone.grades}
    images = list(dict.fromkeys(candidate.image for candidate in judged.candidates))
    place = {image: number for number, image in enumerate(images)}
    members: dict[int, list[int]] = {}
    for number, candidate in enumerate(judged.candidates):
        members.setdefault(place[candidate.image], []).append(number)
    for score in (BASE, "METEOR"):
        values = 100 * scores[score]
        for low, high in pairwise(BINS):
            pairs, right, gap = (np.zeros(len(images)) for _ in range(3))
            for unit, own in members.items():
                for one, two in combinations(own, 2):
                    better, worse = (one, two) if values[one] > values[two] else (two, one)
                    if low <= values[better] - values[worse] < high and values[better] > values[worse]:
                        higher = grade[better] - grade[worse]
                        pairs[unit] += 1
                        right[unit] += 0.5 + 0.5 * np.sign(higher)
                        gap[unit] += higher
            if not pairs.any():
                continue
            found = bootstrap(images, Ratios({"right": (right, pairs), "higher by": (gap, pairs)}))
            for measure, draws in found.items():
                yield row("experts", "", ALL, f"{measure}, {low} to {high}", score, draws) | {
                    "count": f"{pairs.sum():.0f}"
                }


def read_captions(judged: Judged, model: str, folder: Path) -> Scores:
    """What a model says about the candidates."""
    records = judged.records(folder / "images", folder)
    return model_scores(load_dual_encoder(model), judged, records, Settings("outputs/judged_scores"))


def kept(path: Path | None, compute: Callable[[], Scores]) -> Scores:
    """Scores from a file, or computed and then written there; without a file computed alone."""
    if path is not None and path.exists():
        return {name: np.array(values) for name, values in read_json(path, dict).items()}
    scores = compute()
    if path is not None:
        write_json(path, {name: values.tolist() for name, values in scores.items()})
    return scores


def compare(judged: Judged) -> Scores:
    """Scores against references; without one that cannot run, which is said."""
    scores, not_run = reference_scores(judged)
    for name, reason in not_run.items():
        print(f"{name} not run: {reason}")
    return scores


def of_model(data: str, judged: Judged, scores: Scores, name: str, own: Scores) -> Iterator[Row]:
    """Scores of a model, and mixtures on the half of the photos that did not choose their weights."""
    everything = scores | own
    yield from rows_of(data, name, ALL, agreement(judged, everything), own)
    half, mixed, shares = mixtures(judged, everything, MIXTURES)
    found = agreement(half, mixed)
    for each in rows_of(data, name, HALF, found, mixed):
        yield each | {"share": f"{shares[each['score']]:.2f}" if each["score"] in shares else ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judges", choices=FILES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", help="none: scores against references alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"), help="the CSV")
    parser.add_argument("--scores", type=Path, help="folder that keeps the scores of captions between calls")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = {name: str(environment()[name]) for name in ("commit", "machine", "torch")}
    data, judged = args.judges, read_judgments(args.folder / FILES[args.judges])
    scores = kept(args.scores and args.scores / f"{data}.json", partial(compare, judged))
    found = [*against_references(data, judged, scores)]
    for model in args.models:
        name = Path(model).name
        place = args.scores and args.scores / f"{data}_{name}.json"
        own = kept(place, partial(read_captions, judged, model, args.folder))
        found += of_model(data, judged, scores, name, own)
    blank = {"count": "", "share": ""}
    replace_rows(args.out, [blank | each | about for each in found], by=["judgments", "model"])


if __name__ == "__main__":
    main()

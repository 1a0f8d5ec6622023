"""What more compute will bring: a saturating power law through finished runs, with intervals, and how well it predicts
runs that it has not seen (Nezhurina et al. 2025, arXiv 2506.04598).

The law of a score over the compute C is top - a · (C + b) ^ -c. The compute is that of 3 forward passes for each sample
of the training. Only runs on the frontier count: no run of less compute scores higher. Runs of equal compute are seeds
of one point.

For given b and c the law is linear in top and a, so least squares have a closed form. Intervals come from the
profile likelihood (Bates and Watts 1988, section 6.1): what the laws say whose sum of squared residuals S is at most
min S · (1 + t² / (n - 4)), with Student's t of n - 4 degrees of freedom.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from coca_lit.errors import DataError, suggest
from coca_lit.files import atomic_write, spreadsheet_text
from coca_lit.metrics import is_share, lower_is_better
from coca_lit.reading import open_parquet
from coca_lit.runs.scores import headlines, in_print_units, score_name
from coca_lit.tools.report.figures import png_of
from coca_lit.tools.report.runs import Run, obstacles

Numbers = NDArray[np.float64]
# Keys of a run that decide what a sample costs.
NETWORK = ("model.net.", "image_size", "vocabulary", "init_from", "init_parts", "data.")
PARAMETERS = 4
LEAST = PARAMETERS + 1  # points of different compute
CONFIDENCE = 0.95
EXPONENTS = (0.01, 10.0)
CELLS = 100  # of the grid of b and c, along each
ZOOMS = 4  # grids, each around what the one before did not exclude
MARGIN = 5  # cells that are kept around it, since the best law may lie between two cells
PUBLISHED = ("model", "downstream_dataset", "lr_scheduler", "epoch", "total_epochs", "gflops_total", "acc1")
BENCHMARK = "imagenet1k"
FAMILIES = {"mammut": "MaMMUT", "coca": "CoCa", "siglip": "SigLIP", "": "CLIP"}  # by a part of LAION's names


class Point(NamedTuple):
    """A finished run."""

    name: str
    compute: float  # GFLOP of the whole training
    score: float  # raw


class Law(NamedTuple):
    """top - a · (C / unit + b) ^ -c"""

    top: float
    a: float
    b: float
    c: float
    unit: float  # GFLOP

    def __call__(self, compute: Numbers) -> Numbers:
        return np.asarray(self.top - self.a * (np.asarray(compute) / self.unit + self.b) ** -self.c)


class Region(NamedTuple):
    """The laws that the runs do not contradict, (K,) pairs of b and c with the best top and a."""

    tops: Numbers
    factors: Numbers  # a
    offsets: Numbers  # b
    exponents: Numbers  # c
    slack: Numbers  # squared residuals that a law may have beyond those of its pair
    basis_mean: Numbers
    basis_spread: Numbers  # sum of squared deviations from the mean
    runs: int  # that were fitted
    unit: float  # GFLOP

    def curve(self, compute: Numbers) -> tuple[Numbers, Numbers]:
        """Lowest and highest value of the law at each compute (N,)."""
        expected, leverage = self._at(compute)
        return self._ends(expected, leverage)

    def run(self, compute: float) -> tuple[float, float]:
        """Lowest and highest score of another single run."""
        expected, leverage = self._at(np.array([compute]))
        low, high = self._ends(expected, 1 + leverage)
        return float(low[0]), float(high[0])

    def _at(self, compute: Numbers) -> tuple[Numbers, Numbers]:
        """Values (K, N), and their variance in units of that of a run."""
        basis = _basis(compute / self.unit, self.offsets, self.exponents)
        deviation = basis - self.basis_mean[:, None]
        leverage = 1 / self.runs + deviation**2 / self.basis_spread[:, None]
        return self.tops[:, None] + self.factors[:, None] * basis, leverage

    def _ends(self, expected: Numbers, variance: Numbers) -> tuple[Numbers, Numbers]:
        reach = np.sqrt(self.slack[:, None] * variance)
        return (expected - reach).min(axis=0), (expected + reach).max(axis=0)


class Prediction(NamedTuple):
    """Of a run that was held out."""

    point: Point
    expected: float
    low: float  # 95 % interval of this single run
    high: float


class Scaling(NamedTuple):
    """A law, what it was fitted to, and what it says of the other runs."""

    points: Sequence[Point]
    fitted: Sequence[Point]  # on the frontier, below the limit of compute
    law: Law
    region: Region
    top: float  # that no score exceeds
    held_out: Sequence[Prediction]


# The law


def fit_scaling(points: Sequence[Point], hold_out: float = 4.0, top: float = np.inf) -> Scaling:
    """Fits the law to the points with at most 1 / `hold_out` of the largest compute, and predicts the others on the
    frontier of all.

    Args:
        hold_out: 1 fits all points.
        top: what no score exceeds: 1 for shares, 0 for those with a changed sign.

    Raises:
        DataError: fewer than `LEAST` points of different compute are left on the frontier.
    """
    limit = max(point.compute for point in points) / hold_out * 1.001
    fitted = frontier([point for point in points if point.compute <= limit])
    if (count := len({point.compute for point in fitted})) < LEAST:
        raise DataError(
            f"a scaling law needs {LEAST} points of different compute on the frontier up to {limit:.3g} GFLOP, and "
            f"there are {count}: train more lengths or sizes, or lower --hold-out"
        )
    compute, scores = (np.array([point[k] for point in fitted], dtype=float) for k in (1, 2))
    law, region = fit(compute, scores, top)
    held_out = []
    for point in frontier(points):
        if point.compute > limit:
            low, high = np.minimum(region.run(point.compute), top)
            held_out.append(Prediction(point, float(law(np.array(point.compute))), float(low), float(high)))
    return Scaling(points, fitted, law, region, top, held_out)


def frontier(points: Sequence[Point]) -> list[Point]:
    """All runs of those computes whose mean score is higher than that of any smaller compute."""
    groups: dict[float, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.compute):
        groups.setdefault(point.compute, []).append(point)
    kept: list[Point] = []
    best = -np.inf
    for group in groups.values():
        if (mean := float(np.mean([point.score for point in group]))) > best:
            best = mean
            kept += group
    return kept


def _curve(x: Numbers, top: float, a: float, b: float, c: float) -> Numbers:
    return np.asarray(top - a * (x + b) ** -c)


def fit(compute: Numbers, scores: Numbers, top: float = np.inf) -> tuple[Law, Region]:
    """The law of runs (n,), which does not exceed `top`, and those that the runs do not contradict, which may: a bound
    on parameters would make their intervals too narrow.
    """
    try:
        from scipy.stats import t
    except ModuleNotFoundError as error:
        raise DataError("--scaling needs an optional package: pip install 'coca_lit[statistics]'") from error

    unit = float(np.exp(np.log(compute).mean()))
    x = compute / unit
    freedom = len(x) - PARAMETERS
    allowed = 1 + t.ppf((1 + CONFIDENCE) / 2, freedom) ** 2 / freedom
    ranges = np.log([[x.min() / 100, 10 * x.max()], EXPONENTS])  # of b, which is as good as 0 at its smallest, and of c
    for _ in range(ZOOMS):
        axes = np.linspace(ranges[:, 0], ranges[:, 1], CELLS, axis=1)
        pairs = np.stack([axis.ravel() for axis in np.meshgrid(*axes)])
        offsets, exponents = np.exp(pairs)
        basis = _basis(x, offsets, exponents)
        tops, factors, squares = _least_squares(basis, scores, np.inf)
        most = squares.min() * allowed
        inside = squares <= most
        margin = MARGIN * (axes[:, 1] - axes[:, 0])
        lowest = np.maximum(pairs[:, inside].min(axis=1) - margin, ranges[:, 0])
        highest = np.minimum(pairs[:, inside].max(axis=1) + margin, ranges[:, 1])
        ranges = np.stack([lowest, highest], axis=1)
    mean = basis.mean(axis=1)
    spread = ((basis - mean[:, None]) ** 2).sum(axis=1)
    region = Region(
        tops=tops[inside],
        factors=factors[inside],
        offsets=offsets[inside],
        exponents=exponents[inside],
        slack=most - squares[inside],
        basis_mean=mean[inside],
        basis_spread=spread[inside],
        runs=len(x),
        unit=unit,
    )
    tops, factors, squares = _least_squares(basis, scores, top)
    best = squares.argmin()
    law = Law(float(tops[best]), float(factors[best]), float(offsets[best]), float(exponents[best]), unit)
    return law, region


def _basis(x: Numbers, offsets: Numbers, exponents: Numbers) -> Numbers:
    """-(x + b) ^ -c, (K, n)"""
    return np.asarray(-((x + offsets[:, None]) ** -exponents[:, None]))


def _least_squares(basis: Numbers, scores: Numbers, top: float) -> tuple[Numbers, Numbers, Numbers]:
    """For each row of the basis (K, n) the best top, which is at most `top`, the best a, and the sum of squares."""
    mean = basis.mean(axis=1)
    deviation = basis - mean[:, None]
    slopes = np.maximum(deviation @ (scores - scores.mean()) / (deviation**2).sum(axis=1), 0)
    tops = np.minimum(scores.mean() - slopes * mean, top)
    below = scores - tops[:, None]
    factors = np.maximum((basis * below).sum(axis=1) / (basis**2).sum(axis=1), 0)
    return tops, factors, ((below - factors[:, None] * basis) ** 2).sum(axis=1)


# Points


def points_of(runs: Sequence[Run], score: str) -> list[Point]:
    """The trainings that have the score, a lower-is-better one with its sign changed. What a sample costs is measured
    with the model in the run folder.

    Raises:
        DataError: a run has no checkpoint, none has the score, or they have it of other images or under other settings.
    """
    from coca_lit.models.cost import forward_flops
    from coca_lit.weights.load import load_dual_encoder

    sign = -1 if lower_is_better(score) else 1
    points = []
    known: dict[str, float] = {}  # GFLOP by the description of the network
    scored = [run for run in runs if score in run.results]
    trained = [run for run in scored if run.environment.get("samples", 0) > 0]
    if scored and not trained:
        raise DataError(f"the runs with {score} are evaluations: a scaling law needs trainings")
    recorded = any(score in run.conditions for run in trained)
    for run, why_not in zip(trained, obstacles(trained, score), strict=True):
        if why_not and recorded:
            raise DataError(f"{score} of {trained[0].name} and {run.name} cannot be compared: {why_not}")
    for run in trained:
        shape = repr([(key, run.config[key]) for key in sorted(run.config) if key.startswith(NETWORK)])
        if shape not in known:
            known[shape] = forward_flops(load_dual_encoder(run.folder)) / 1e9
        compute = 3 * known[shape] * run.environment["samples"]
        points.append(Point(run.name, compute, sign * run.results[score]))
    if not points:
        raise DataError(f"no training has the score {score}{suggest(score, {s for run in runs for s in run.results})}")
    return points


def published_points(path: Path) -> dict[str, list[Point]]:
    """Top-1 accuracy of finished trainings with a cosine, by family, from the `results.parquet` of LAION's study
    (github.com/LAION-AI/scaling-laws-for-comparison).

    Raises:
        DataError: the file has other columns.
    """
    with open_parquet(path) as file:
        if missing := [name for name in PUBLISHED if name not in file.schema_arrow.names]:
            raise DataError(f"{path} has no column {missing[0]}: give results.parquet of LAION's scaling study")
        rows = file.read(columns=[*PUBLISHED]).to_pylist()
    found: dict[str, list[Point]] = {}
    for row in rows:
        finished = row["epoch"] == row["total_epochs"] and row["lr_scheduler"] == "cosine"
        if finished and row["downstream_dataset"] == BENCHMARK and row["acc1"] and row["gflops_total"]:
            family = next(name for part, name in FAMILIES.items() if part in row["model"].lower())
            accuracy = row["acc1"] if row["acc1"] <= 1 else row["acc1"] / 100
            found.setdefault(family, []).append(Point(row["model"], float(row["gflops_total"]), accuracy))
    return found


# Report


def write_scaling(
    runs: Sequence[Run], output: Path, score: str | None, hold_out: float, published: Path | None = None
) -> str:
    """Writes scaling.png and scaling.csv into `output`, and returns what there is to say.

    Raises:
        DataError: there are too few runs, or they lack what a law needs.
    """
    score = score or next((name for run in runs for name in headlines(run.results) if is_share(name)), None)
    if score is None:
        raise DataError("the runs have no headline score that is a share: name one, --objective scenes/CIDEr")
    top = 0.0 if lower_is_better(score) else 1.0 if is_share(score) else np.inf
    panels = {score: {"": fit_scaling(points_of(runs, score), hold_out, top)}}
    text, said = io.StringIO(), list[str]()
    for family, points in published_points(published).items() if published else ():
        try:
            panels.setdefault(f"{BENCHMARK}/top1", {})[family] = fit_scaling(points, hold_out, 1.0)
        except DataError as error:
            said.append(f"{family} is not drawn: {error}")
    writer = csv.writer(text)
    writer.writerow(["score", "family", "run", "GFLOP", "value", "fitted", "expected", "low", "high"])
    for name, laws in panels.items():
        for family, found in laws.items():
            said += _said(name, family, found)
            held_out = {id(prediction.point): prediction[1:] for prediction in found.held_out}
            fitted = set(map(id, found.fitted))
            for point in found.points:
                row = [name, family, *point, id(point) in fitted, *held_out.get(id(point), ("", "", ""))]
                writer.writerow(map(spreadsheet_text, row))
    atomic_write(output / "scaling.csv", text.getvalue().encode())
    atomic_write(output / "scaling.png", _drawn(panels))
    return "\n".join(said)


def _said(score: str, family: str, found: Scaling) -> list[str]:
    def shown(value: float) -> str:
        return f"{in_print_units(score, abs(value)):.1f}"  # without a changed sign

    sign = "+" if lower_is_better(score) else "-"
    law = found.law
    exponents = found.region.exponents
    title = " ".join(filter(None, (family, score_name(score))))
    lines = [
        f"{title}: {shown(law.top)} {sign} {shown(law.a)} (C / {law.unit:.3g} GFLOP + {law.b:.2g}) ^ -{law.c:.2f}, "
        f"exponent [{exponents.min():.2f}, {exponents.max():.2f}], {len(found.fitted)} of {len(found.points)} runs are "
        "on the frontier"
    ]
    for point, expected, low, high in found.held_out:
        verdict = "inside" if low <= point.score <= high else "outside"
        interval = ", ".join(sorted((shown(low), shown(high)), key=float))
        lines.append(
            f"  {point.compute:.3g} GFLOP, held out: {shown(expected)} [{interval}] expected, {shown(point.score)} "
            f"measured, {verdict} ({point.name})"
        )
    return lines


def _drawn(panels: dict[str, dict[str, Scaling]]) -> bytes:
    figure = Figure(figsize=(5.2 * len(panels), 3.8), dpi=160, layout="constrained")
    for axes, (score, laws) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (family, found) in enumerate(laws.items()):
            _draw_law(axes, f"C{number}", family, found, in_print_units(score, 1.0))
        axes.set(
            xscale="log", xlabel="training compute, GFLOP", ylabel=score_name(score), title=score.partition("/")[0]
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return png_of(figure)


def _draw_law(axes: Axes, colour: str, family: str, found: Scaling, unit: float) -> None:
    """Scores in the unit of papers, without a changed sign."""
    computes = [point.compute for point in found.points]
    compute = np.geomspace(min(computes), max(computes), num=100)
    low_curve, high_curve = unit * np.abs(np.minimum(found.region.curve(compute), found.top))
    axes.fill_between(compute, low_curve, high_curve, color=colour, alpha=0.15)
    label = f"{family} {len(found.fitted)} runs fitted".strip()
    axes.plot(compute, unit * np.abs(found.law(compute)), color=colour, label=label)
    fitted = set(map(id, found.fitted))
    rest = [point for point in found.points if id(point) not in fitted]
    for points, marker, alpha in ((found.fitted, "o", 1.0), (rest, ".", 0.3)):
        scores = [unit * abs(p.score) for p in points]
        axes.plot([p.compute for p in points], scores, marker, color=colour, alpha=alpha, ms=4)
    for point, expected, low, high in found.held_out:
        middle, low, high = (unit * abs(y) for y in (expected, low, high))
        errors = [[abs(middle - min(low, high))], [abs(max(low, high) - middle)]]
        axes.errorbar([point.compute], [middle], errors, color=colour, capsize=3, fmt="_")
        axes.plot([point.compute], [unit * abs(point.score)], "x", color=colour)

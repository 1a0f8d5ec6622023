"""How much a score would vary on other images of the same kind: the bootstrap (Efron and Tibshirani 1993);
and what it depends on besides the model: scores of two models can be compared only where that is the same.

A resample draws as many images as there are, with replacement; the score of many resamples scatters as the score itself
would. A score states how to compute it from images drawn any number of times, see `Resampled`: as sums of statistics of
the images (BLEU, METEOR, means), or from all of them at once (CIDEr, whose weights of words depend on the set).

The resamples depend on the number of images alone. Two models scored on the same images therefore see the same
resamples, and the draw-by-draw differences of their scores form the paired bootstrap (Koehn 2004).
Shapes: D draws, U units (images), S scores.
"""

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from coca_lit.metrics import is_share

DRAWS = 1000
SEED = 0
LEVEL = 0.95
AT_ONCE = 1_000_000  # counts in memory
EQUAL = 1e-9  # draws within this are the same, but for rounding
JUDGE = "judge"  # the setting that names the checkpoint behind CLIPScore; None: each model judges itself

# How often (D, U) each unit was drawn -> the values (D,) of each score.
Resampled = Callable[[np.ndarray], Mapping[str, np.ndarray]]
# Score -> two statistics (U,), see `Ratios`.
Parts = Mapping[str, tuple[np.ndarray, np.ndarray | None]]


class Draws(NamedTuple):
    """The values of a score in all resamples.

    Attributes:
        values: (D,)
        score: of the units themselves.
        units: a digest of the units in their order. Draws with the same digest are of the same resamples.
        trials: number of units that it is of; 0 if unknown.
        share: whether it is one, see `is_share`, and in [0, 1].
    """

    values: np.ndarray
    score: float
    units: str
    trials: int = 0
    share: bool = False

    def interval(self) -> tuple[float, float]:
        """Limits of the score; NaN if there are no draws, or if these do not scatter and so say nothing, as where no
        caption of seven has a word of its references.

        Of a share it is Wilson's interval (1927), which stays within [0, 1] and is not empty at 0 of 64, for the number
        of independent units whose share scatters as the draws do: fewer than `trials` where texts of an image agree.

        Of other scores it is between the percentiles of the draws, moved so that the mean of the draws is the score,
        but not beyond all draws, as there are no ranks below 1. That mean differs from the score where a unit that is
        drawn twice changes what others are worth: CIDEr of 5,000 images is higher by 0.7 %.
        """
        known = self.values[~np.isnan(self.values)]  # a rare category may be absent from a resample
        if not len(known):
            return float("nan"), float("nan")
        if self.share:
            share = self.score
            z = NormalDist().inv_cdf((1 + LEVEL) / 2)
            units = share * (1 - share) / known.var() if np.ptp(known) >= EQUAL else self.trials
            middle = (share + z**2 / (2 * units)) / (1 + z**2 / units)
            half = z / (1 + z**2 / units) * math.sqrt(share * (1 - share) / units + z**2 / (4 * units**2))
            return max(middle - half, 0.0), min(middle + half, 1.0)
        if np.ptp(known) < EQUAL:
            return float("nan"), float("nan")
        limits = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) + (self.score - known.mean())
        low, high = limits.clip(min(known.min(), self.score), max(known.max(), self.score))
        return min(float(low), self.score), max(float(high), self.score)  # a skew may move both limits past it


class Difference(NamedTuple):
    """Of two scores on the same images.

    Attributes:
        value: second score minus first score.
        low, high: the interval of the difference.
        p: how often a difference as large would turn up if the models were equally good; two-sided.
    """

    value: float
    low: float
    high: float
    p: float

    @property
    def noise(self) -> bool:
        """Whether these images cannot distinguish the scores."""
        return not self.p < 1 - LEVEL  # also for NaN


def bootstrap(units: Sequence[Hashable], *scores: Resampled, draws: int = DRAWS) -> dict[str, Draws]:
    """Draws of the scores, by name.

    Args:
        units: what is drawn, by id, in the order of the counts that the scores get.
    """
    of = digest(units)
    once = exact(len(units), *scores)
    parts: dict[str, list[np.ndarray]] = {}
    for counts in resamples(len(units), draws):
        for score in scores:
            for name, values in score(counts).items():
                parts.setdefault(name, []).append(values)
    judged = {name: count for score in scores if isinstance(score, Ratios) for name, count in score.units.items()}
    # A measure of a user may be called a share and be in percent.
    return {
        name: Draws(
            np.concatenate(values),
            once[name],
            of,
            trials=judged.get(name, len(units)),
            share=is_share(name) and 0 <= once[name] <= 1,
        )
        for name, values in parts.items()
    }


def exact(units: int, *scores: Resampled) -> dict[str, float]:
    """The scores themselves: every unit is drawn once."""
    return {name: float(value[0]) for score in scores for name, value in score(np.ones((1, units))).items()}


def resamples(units: int, draws: int = DRAWS, seed: int = SEED) -> Iterator[np.ndarray]:
    """How often each unit was drawn, as float64 (D, U) for some of the draws at a time."""
    random = np.random.default_rng([seed, units])
    size = max(1, AT_ONCE // units)
    for start in range(0, draws, size):
        count = min(size, draws - start)
        drawn = random.integers(units, size=(count, units)) + units * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units).astype(np.float64)


class Ratios:
    """Scores that are the sum over units of one statistic (U,) over the sum of another; None for a mean over units.

    Attributes:
        units: how many units each score is of: those with a part in the sum below.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.units = {
            n: len(over) if under is None else int(np.count_nonzero(under)) for n, (over, under) in parts.items()
        }

    def __call__(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):
            return {
                name: counts @ over / (counts.sum(axis=1) if under is None else counts @ under)
                for name, (over, under) in self.parts.items()
            }


class Units:
    """Rows that are drawn together, such as the questions about an image.

    Args:
        keys: of each row, what it shares with the others of its unit.

    Attributes:
        first: the first row of each unit; the units are in this order.
    """

    def __init__(self, keys: Iterable[Hashable]) -> None:
        numbers: dict[Hashable, int] = {}
        self._of_row = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        self.first: list[int] = np.unique(self._of_row, return_index=True)[1].tolist()

    def mean(self, values: np.ndarray, rows: Any = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """For `Ratios`, the mean of the values of some rows: their sums and their number in each unit (U,)."""
        own = self._of_row[rows]
        count = len(self.first)
        return np.bincount(own, values[rows], count), np.bincount(own, np.ones(len(own)), count)


def difference(first: Draws, second: Draws) -> Difference:
    """The paired bootstrap test of two scores.

    The p-value compares the difference with the scatter of its draws about their mean, as sacreBLEU does (Riezler and
    Maxwell 2005), and is at least that of as many fair coins as there are images that all fall on one side: three
    images that agree show little. The interval is that of the draws. Where these do not scatter, since no image is an
    exception (both models are right on the same ones), that of shares reaches as far as Wilson's of 0 exceptions,
    within [-1, 1], and that of other scores is NaN. Resamples in which a score is NaN are left out; if there are no
    others, all is NaN.

    Raises:
        ValueError: the draws are of different images.
    """
    if first.units != second.units or first.values.shape != second.values.shape:
        raise ValueError("a paired test needs draws of the same images")
    values = second.values - first.values
    value = second.score - first.score
    values = values[~np.isnan(values)]
    if not len(values) or math.isnan(value):
        return Difference(value, float("nan"), float("nan"), float("nan"))
    scatter = np.abs(values - values.mean())
    p = (1 + int((scatter >= abs(value)).sum())) / (1 + len(values))
    low, high = Draws(values, value, first.units).interval()
    trials = min(first.trials, second.trials)
    if trials:
        p = max(p, 2.0 ** (1 - trials))
    elif scatter.max() < EQUAL <= abs(value):
        p = float("nan")
    if first.share and second.share and scatter.max() < EQUAL:
        _, rest = Draws(np.zeros(1), 0.0, first.units, trials, share=True).interval()
        low = max(value - rest, -1.0)
        high = min(value + rest, 1.0)
    return Difference(value, low, high, p)


class Conditions(NamedTuple):
    """How a score came about.

    Attributes:
        split: as configured; for readers, since digests tell whether the images are the same.
        images: number of images.
        image_digest: of their ids, in order, see `digest`.
        texts: number of references, candidates of retrieval or prompts of classes.
        text_digest: of these, in order.
        settings: of the evaluation, if the score depends on them: `{"generate.num_beams": 4}`, `{"rerank": 16}`.
    """

    split: str
    images: int
    image_digest: str
    texts: int
    text_digest: str
    settings: Mapping[str, Any]


def digest(items: Iterable[Any]) -> str:
    """16 hexadecimal digits of SHA-256 over the items as JSON."""
    return hashlib.sha256(json.dumps(list(items), default=str).encode()).hexdigest()[:16]

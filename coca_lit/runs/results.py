"""What a run writes at its end: its scores in `results.json`; their uncertainty in `intervals.json`, for readers, and
`draws.npz`, from which runs are compared; and what they depend on besides the model in `conditions.json`, from which
`coca-report` knows what it may compare.
"""

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coca_lit.errors import DataError
from coca_lit.files import atomic_write, write_json, write_waiting
from coca_lit.metrics.uncertainty import JUDGE, LEVEL, Conditions, Draws
from coca_lit.reading import printable, read_run_json, read_run_npz
from coca_lit.runs.run_folder import (
    CONDITIONS,
    DRAWS,
    EARLIER_SECONDS,
    INTERVALS,
    RESULTS,
    add_to_environment,
    seconds_so_far,
)
from coca_lit.runs.scores import print_scores

if TYPE_CHECKING:
    from coca_lit.evals import Evaluation

HOW = f"{LEVEL:.0%}, from the scores of 1,000 resamples of the images, drawn with replacement; of shares by Wilson"
TRIES, PAUSE = 10, 30  # to write the scores on a full disk, and seconds between two tries


@dataclass
class Found:
    """What the evaluations of a run found, by the name of the score; for the last three see `Evaluation`."""

    scores: dict[str, float] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    draws: dict[str, Draws] = field(default_factory=dict)
    conditions: dict[str, Conditions] = field(default_factory=dict)

    def add(self, evaluation: "Evaluation", scores: dict[str, float]) -> None:
        """Adds what `evaluation.evaluate` has returned and noted."""
        self.scores |= scores
        self.not_run |= evaluation.not_run
        self.draws |= evaluation.draws
        self.conditions |= evaluation.conditions


def finish_run(
    folder: Path, found: Found, model: dict[str, Any] | None = None, report: Callable[[Path], Any] | None = None
) -> None:
    """Prints the scores of a run with their uncertainty, and writes them, why others are missing (`not_run.json`), and
    its report. On a full disk it tries again for some minutes.

    Args:
        model: for `environment.json`: its parameters, samples and tokens that it was trained on.
        report: writes the report of a run folder, and is called last: the run is finished once that is written, too.

    Raises:
        DataError: they cannot be written.
    """
    print_with_conditions(found.scores, found.draws, found.conditions)
    for left in reversed(range(TRIES)):
        try:
            write_waiting()
            write_draws(folder, found.draws)
            write_conditions(folder, found.conditions)
            (folder / "report.html").unlink(missing_ok=True)  # of an earlier scoring
            add_to_environment(folder, model or {})
            seconds = round(seconds_so_far(folder))
            earlier = add_to_environment(folder, {"seconds": seconds}).get(EARLIER_SECONDS, 0)
            write_json(folder / RESULTS, found.scores)
            write_json(folder / "not_run.json", found.not_run)
            if report is not None:
                report(folder)
            break
        except (DataError, OSError) as error:
            if not left:
                raise DataError(f"{error}: make room; the same command then scores again and writes them") from error
            print(f"{error}; trying again in {PAUSE} seconds", flush=True)
            time.sleep(PAUSE)
    hint = "; open report.html there" if (folder / "report.html").exists() else ""
    took = f"took {timedelta(seconds=seconds - earlier)}"
    total = f", {timedelta(seconds=seconds)} with its earlier starts" if earlier else ""
    print(f"{took}{total}; the run is in {folder}{hint}", flush=True)


def print_with_conditions(
    scores: Mapping[str, float], draws: Mapping[str, Draws], conditions: Mapping[str, Conditions]
) -> None:
    """Prints scores with the number of their images and the model that judged."""
    images = {score: of.images for score, of in conditions.items()}
    judges = {score: of.settings[JUDGE] for score, of in conditions.items() if JUDGE in of.settings}
    print_scores(scores, draws, images, judges)


def write_draws(folder: Path, draws: Mapping[str, Draws]) -> None:
    """Writes both files into a run folder, nothing if there are no draws."""
    for name in (INTERVALS, DRAWS):
        (folder / name).unlink(missing_ok=True)  # of an earlier scoring
    if not draws:
        return
    intervals = {
        score: [number if math.isfinite(number) else None for number in of.interval()] for score, of in draws.items()
    }
    write_json(folder / INTERVALS, {"how": HOW, "intervals": intervals})
    content = io.BytesIO()
    scores = np.array(list(draws))
    np.savez_compressed(
        content,
        scores=scores,
        units=np.array([of.units for of in draws.values()]),
        points=np.array([of.score for of in draws.values()], dtype=np.float64),
        trials=np.array([of.trials for of in draws.values()], dtype=np.int64),
        shares=np.array([of.share for of in draws.values()], dtype=bool),
        values=np.stack([of.values for of in draws.values()]),
    )
    atomic_write(folder / DRAWS, content.getvalue())


def read_draws(folder: Path) -> dict[str, Draws]:
    """Draws by score; none if the run has none.

    Raises:
        DataError: the file holds something else.
    """
    file = read_run_npz(folder, DRAWS)
    if not file:
        return {}
    try:
        names, points, units, trials, shares = (
            file[name].tolist() for name in ("scores", "points", "units", "trials", "shares")
        )
        rows = zip(file["values"], points, units, trials, shares, strict=True)
        return {str(name): Draws(*row) for name, row in zip(names, rows, strict=True)}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / DRAWS} does not hold the resampled scores of a run ({error}): remove it") from error


def write_conditions(folder: Path, conditions: Mapping[str, Conditions]) -> None:
    """Writes the file: a list of conditions, each with the names of its `scores`."""
    rows: list[dict[str, Any]] = []
    for of in conditions.values():
        row = {"scores": [score for score, its in conditions.items() if its == of], **of._asdict()}
        if row not in rows:
            rows.append(row)
    write_json(folder / CONDITIONS, rows)


def read_conditions(folder: Path) -> dict[str, Conditions]:
    """Conditions by score; none if the run has none.

    Raises:
        DataError: the file holds something else.
    """
    found: dict[str, Conditions] = {}
    for row in read_run_json(folder, CONDITIONS, list):
        try:
            scores = row.pop("scores")
            conditions = Conditions(**row)
            kinds = [type(value) for value in (*conditions, *scores, *conditions.settings)]
            if kinds[:6] != [str, int, str, int, str, dict] or {*kinds[6:]} - {str} or not isinstance(scores, list):
                raise TypeError("values of other types")
        except (AttributeError, KeyError, TypeError) as error:
            place = printable(str(folder / CONDITIONS))
            raise DataError(f"{place} does not hold what a run writes there: remove it") from error
        found |= dict.fromkeys(scores, conditions)
    return found

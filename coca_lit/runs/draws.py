"""The uncertainty of a run's scores: `intervals.json` for readers, and `draws.npz`, from which runs are compared."""

import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np

from coca_lit.errors import DataError
from coca_lit.files import atomic_write
from coca_lit.metrics.uncertainty import LEVEL, Draws

INTERVALS, DRAWS = "intervals.json", "draws.npz"
HOW = f"the middle {LEVEL:.0%} of the scores of 1,000 resamples of the images, drawn with replacement"


def write_draws(folder: Path, draws: dict[str, Draws]) -> None:
    """Writes both files into a run folder, nothing if there are no draws."""
    for name in (INTERVALS, DRAWS):
        (folder / name).unlink(missing_ok=True)  # of an earlier scoring
    if not draws:
        return
    intervals = {
        score: [number if math.isfinite(number) else None for number in of.interval()] for score, of in draws.items()
    }
    atomic_write(folder / INTERVALS, (json.dumps({"how": HOW, "intervals": intervals}, indent=2) + "\n").encode())
    content = io.BytesIO()
    scores = np.array(list(draws))
    np.savez_compressed(
        content,
        scores=scores,
        units=np.array([of.units for of in draws.values()]),
        points=np.array([of.score for of in draws.values()], dtype=np.float64),
        values=np.stack([of.values for of in draws.values()]),
    )
    atomic_write(folder / DRAWS, content.getvalue())


def read_draws(folder: Path) -> dict[str, Draws]:
    """Draws by score; none if the run has none.

    Raises:
        DataError: the file holds something else.
    """
    path = folder / DRAWS
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            scores, units, points, values = (file[name] for name in ("scores", "units", "points", "values"))
            if {scores.shape, units.shape, points.shape} != {values.shape[:1]} or values.ndim != 2:
                raise ValueError("arrays of other shapes")
            if points.dtype != np.float64 or values.dtype != np.float64:
                raise ValueError("arrays of other types")
            parts = zip(scores.tolist(), values, points.tolist(), units.tolist(), strict=True)
            return {str(name): Draws(row, point, str(of)) for name, row, point, of in parts}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} does not hold the resampled scores of a run: {error}; remove it to do without intervals"
        ) from error

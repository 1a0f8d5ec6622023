"""How often the intervals of a scaling law hold the truth: simulated studies of known laws, 12 computes with 3 seeds.

    python experiments/scaling/intervals.py [studies of each law and noise]     # writes intervals.csv

As in a real study, the runs with at most a quarter of the largest compute are fitted, and the others are held out.
"""

import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from coca_lit.projects.scaling.law import Law, Numbers, Point, fit_scaling
from coca_lit.runs.run_folder import environment
from experiments.study import write_rows

RESULTS = Path(__file__).with_suffix(".csv")
SEED = 20261202
COMPUTE = np.repeat(np.geomspace(0.03, 30, num=12), 3)
TOP = 1.0
SPREAD = 0.01  # standard deviation of a run
IMAGES = 2000  # of a share: a standard deviation of about 0.01, which changes with the score
LAWS = {
    "steep, nearly saturated": Law(top=0.95, a=0.25, b=0.1, c=0.6, unit=1.0),
    "slow, far from its top": Law(top=1.0, a=0.5, b=0.3, c=0.25, unit=1.0),
    "flat at first": Law(top=0.8, a=0.9, b=2.0, c=1.2, unit=1.0),
}
NOISES: dict[str, Callable[[Numbers, np.random.Generator], Numbers]] = {
    "normal": lambda scores, rng: rng.normal(scores, SPREAD),
    "heavy tails (t of 4)": lambda scores, rng: scores + SPREAD * rng.standard_t(4, scores.shape) / np.sqrt(2),
    "share of 2,000": lambda scores, rng: rng.binomial(IMAGES, scores) / IMAGES,
}
MEASURES = ("runs", "curve", "exponent")


def simulate(law: Law, noise: Callable[[Numbers, np.random.Generator], Numbers], seed: list[int]) -> dict[str, float]:
    """Shares of what one study's intervals hold: its held-out runs, the law at their computes, and the exponent."""
    scores = noise(law(COMPUTE), np.random.default_rng(seed))
    found = fit_scaling([Point("", float(c), float(s)) for c, s in zip(COMPUTE, scores, strict=True)], top=TOP)
    later = np.unique([prediction.point.compute for prediction in found.held_out])
    low, high = np.minimum(found.region.curve(later), TOP)
    truth = law(later)
    exponents = found.region.exponents
    return {
        "runs": float(np.mean([p.low <= p.point.score <= p.high for p in found.held_out])),
        "curve": float(np.mean((low <= truth) & (truth <= high))),
        "exponent": float(exponents.min() <= law.c <= exponents.max()),
    }


def main() -> None:
    machine = environment()
    about = {key: str(machine[key]) for key in ("commit", "machine", "torch")}
    about["command"] = " ".join(["python experiments/scaling/intervals.py", *sys.argv[1:]])
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    rows = []
    for law_name, law in LAWS.items():
        for noise_name, noise in NOISES.items():
            cell = zlib.crc32(f"{law_name} {noise_name}".encode())
            shares = [simulate(law, noise, [SEED, cell, number]) for number in range(studies)]
            means = {measure: f"{np.mean([share[measure] for share in shares]):.4f}" for measure in MEASURES}
            rows.append({"law": law_name, "noise": noise_name, "studies": studies, **means, **about})
            print(law_name, noise_name, means, flush=True)
    write_rows(RESULTS, rows)


if __name__ == "__main__":
    main()

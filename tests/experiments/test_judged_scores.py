"""The study of judged scores: means of judges, and what a difference of CIDEr means, by hand."""

import numpy as np
import pytest

pytest.importorskip("scipy")

from coca_lit.projects.judgments.judged import Candidate, Grade, Judged
from experiments.judged_scores.judge import gained, mean_grades

CANDIDATES = [Candidate("a", "1"), Candidate("a", "2"), Candidate("a", "3"), Candidate("b", "1"), Candidate("b", "2")]
GRADES = [(1, 2), (3, 4), (3, 4), (2, 2), (1, 1)]  # of two judges
JUDGED = Judged(
    "x", CANDIDATES, {}, [Grade(n, float(g), str(j)) for n, own in enumerate(GRADES) for j, g in enumerate(own)]
)


def test_means_of_some_judges() -> None:
    assert [grade.value for grade in mean_grades(JUDGED, ("0", "1")).grades] == [1.5, 3.5, 3.5, 2, 1]
    assert [grade.value for grade in mean_grades(JUDGED, ("1",)).grades] == [2, 4, 4, 2, 1]


def test_what_a_difference_means() -> None:
    """CIDEr 10, 12 and 90 of photo a, 30 and 33 of b: two pairs are nearer than 5, one right by 2, one wrong by 1."""
    scores = {"CIDEr": np.array([0.1, 0.12, 0.9, 0.30, 0.33]), "METEOR": np.zeros(5)}
    rows = {row["measure"]: row for row in gained(JUDGED, scores) if row["score"] == "CIDEr"}
    assert {measure: float(row["value"]) for measure, row in rows.items()} == {
        "right, 0 to 5": 50,
        "higher by, 0 to 5": pytest.approx(100 * (2 - 1) / 2),
        "right, 40 to 80": 50,  # 12 and 90, with equal grades; 10 and 90 are not below 80
        "higher by, 40 to 80": 0,
        "right, 80 to inf": 100,
        "higher by, 80 to inf": 200,
    }
    assert rows["right, 0 to 5"]["count"] == "2"

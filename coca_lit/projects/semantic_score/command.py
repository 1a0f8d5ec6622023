"""`coca-score … --semantic`: semantic scores beside the other scores of captions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coca_lit.tools.score.command import score_files

if TYPE_CHECKING:
    from coca_lit.tools.score.command import Measure


def score_with_meaning(words: Sequence[str]) -> None:
    """Answers the words of `coca-score`, of which `--semantic` is one."""

    def make_measure() -> "Measure":
        from coca_lit.projects.semantic_score.measure import semantic_scores

        return semantic_scores

    score_files([word for word in words if word != "--semantic"], make_measure)

"""Which score ranks runs, and which way is up."""

import math
from collections.abc import Collection, Mapping

from coca_lit.metrics import lower_is_better

HEADLINES = ("/CIDEr", "_recall@1", "/exact_match", "/top1", "/accuracy")


def headline(scores: Collection[str]) -> str | None:
    """The score that ranks runs when none was named: the first of the kinds in `HEADLINES`, in their order."""
    return next((score for kind in HEADLINES for score in scores if score.endswith(kind)), None)


def best_run(results: Mapping[str, Mapping[str, float]], score: str) -> str | None:
    """The run with the best `score`; None if no run has it.

    Args:
        results: run -> score -> value.
    """
    values = {run: scores[score] for run, scores in results.items() if score in scores}
    values = {run: value for run, value in values.items() if not math.isnan(value)}
    return (min if lower_is_better(score) else max)(values, key=lambda run: values[run], default=None)

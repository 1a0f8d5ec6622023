"""What happens around the training step: checkpoints, guards, averaging, progress."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from coca_lit.callbacks.averaging import Averaging
from coca_lit.callbacks.checkpoint import Checkpoints, StepSeeds
from coca_lit.callbacks.guards import BadSampleLog, NonFiniteGuard, SameOnAllRanks
from coca_lit.callbacks.loggers import LogHyperparameters, MetricsLog
from coca_lit.callbacks.progress import (
    RunSummary,
    SamplesSeen,
    SourceCounts,
    Throughput,
    progress_bar,
    samples_seen,
)
from coca_lit.callbacks.scoring import ScoreDuringTraining
from coca_lit.errors import ConfigError

__all__ = [
    "BadSampleLog",
    "Checkpoints",
    "MetricsLog",
    "NonFiniteGuard",
    "SamplesSeen",
    "ScoreDuringTraining",
    "SourceCounts",
    "StepSeeds",
    "Throughput",
    "in_order",
    "progress_bar",
    "samples_seen",
]


def in_order(
    chosen: Sequence[L.Callback],
    scoring: L.Callback,
    ema: float | None,
    output_dir: str,
    config: Callable[[], dict[str, Any]],
    resumes: bool = False,
) -> list[L.Callback]:
    """All callbacks of a run in the order in which they must act. Averaged weights replace the trained ones when
    training ends: after the last checkpoint, before the final scores.

    Args:
        chosen: those of the configuration.
        ema: decay of averaged weights; None for none.
        config: returns the run's config, resolved and without secrets, for the loggers.
        resumes: whether the run resumes from a checkpoint.

    Raises:
        ConfigError: a chosen callback averages weights, which would be scored and saved without the average.
    """
    for callback in chosen:
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ConfigError(f"callbacks: {type(callback).__name__} comes after scores and checkpoints: set ema=DECAY")
    checkpoints = [callback for callback in chosen if isinstance(callback, Checkpoints)]
    others = [callback for callback in chosen if callback not in checkpoints]
    averaging = [Averaging(ema)] if ema is not None else []
    always = [SamplesSeen(), SourceCounts(), LogHyperparameters(config), RunSummary(output_dir)]
    return [*checkpoints, *averaging, scoring, *others, SameOnAllRanks(output_dir, resumes), *always]

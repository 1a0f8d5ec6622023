"""What happens around the training step: checkpoints, guards, averaging, progress."""

from coca_lit.callbacks.averaging import Averaging
from coca_lit.callbacks.bad_sample_log import BadSampleLog
from coca_lit.callbacks.checkpoint import Checkpoints
from coca_lit.callbacks.non_finite_guard import NonFiniteGuard
from coca_lit.callbacks.progress import SamplesSeen, SourceCounts, Throughput, progress_bar, samples_seen
from coca_lit.callbacks.resuming import StepSeeds
from coca_lit.callbacks.scoring import ScoreDuringTraining

__all__ = [
    "Averaging",
    "BadSampleLog",
    "Checkpoints",
    "NonFiniteGuard",
    "SamplesSeen",
    "ScoreDuringTraining",
    "SourceCounts",
    "StepSeeds",
    "Throughput",
    "progress_bar",
    "samples_seen",
]

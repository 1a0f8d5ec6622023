"""What happens beside the training step: when to score, checkpoints, guards, progress, speed."""

from coca_lit.callbacks.averaging import Averaging
from coca_lit.callbacks.bad_sample_log import BadSampleLog
from coca_lit.callbacks.checkpoint import Checkpoints
from coca_lit.callbacks.non_finite_guard import NonFiniteGuard
from coca_lit.callbacks.progress import SamplesSeen, Throughput, progress_bar, samples_seen
from coca_lit.callbacks.scoring import ScoreDuringTraining
from coca_lit.callbacks.source_counts import SourceCounts
from coca_lit.callbacks.step_seeds import StepSeeds

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

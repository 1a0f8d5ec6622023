"""What happens around the training step: checkpoints, guards, averaging, progress."""

from coca_lit.callbacks.averaging import Averaging
from coca_lit.callbacks.bad_sample_log import BadSampleLog
from coca_lit.callbacks.checkpoint import Checkpoints
from coca_lit.callbacks.non_finite_guard import NonFiniteGuard
from coca_lit.callbacks.progress import RunSummary, SamplesSeen, SourceCounts, Throughput, progress_bar, samples_seen
from coca_lit.callbacks.resuming import StepSeeds
from coca_lit.callbacks.run_folder_guard import RunFolderGuard
from coca_lit.callbacks.scoring import ScoreDuringTraining
from coca_lit.callbacks.stall_guard import StallGuard
from coca_lit.callbacks.tracking import LogRunFacts

__all__ = [
    "Averaging",
    "BadSampleLog",
    "Checkpoints",
    "LogRunFacts",
    "NonFiniteGuard",
    "RunFolderGuard",
    "RunSummary",
    "SamplesSeen",
    "ScoreDuringTraining",
    "SourceCounts",
    "StallGuard",
    "StepSeeds",
    "Throughput",
    "progress_bar",
    "samples_seen",
]

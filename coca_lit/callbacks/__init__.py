"""What happens beside the training step: checkpoints, guards, scores, progress, speed."""

from coca_lit.callbacks.averaging import Averaging
from coca_lit.callbacks.bad_sample_log import BadSampleLog
from coca_lit.callbacks.captions import CaptionScores
from coca_lit.callbacks.checkpoint import Checkpoints
from coca_lit.callbacks.evaluation import Evaluation
from coca_lit.callbacks.progress import SamplesSeen, Throughput, progress_bar, samples_seen
from coca_lit.callbacks.retrieval import RetrievalScores
from coca_lit.callbacks.source_counts import SourceCounts
from coca_lit.callbacks.step_guard import StepGuard
from coca_lit.callbacks.step_seeds import StepSeeds
from coca_lit.callbacks.vqa import VQAScores
from coca_lit.callbacks.zeroshot import ZeroShotScores

__all__ = [
    "Averaging",
    "BadSampleLog",
    "CaptionScores",
    "Checkpoints",
    "Evaluation",
    "RetrievalScores",
    "SamplesSeen",
    "SourceCounts",
    "StepGuard",
    "StepSeeds",
    "Throughput",
    "VQAScores",
    "ZeroShotScores",
    "progress_bar",
    "samples_seen",
]

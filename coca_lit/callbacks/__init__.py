"""What happens beside the training step: scores, progress, speed."""

from coca_lit.callbacks.bad_sample_log import BadSampleLog
from coca_lit.callbacks.evaluation import CaptionScores, Evaluation, RetrievalScores, ZeroShotScores
from coca_lit.callbacks.progress import Throughput, progress_bar

__all__ = [
    "BadSampleLog",
    "CaptionScores",
    "Evaluation",
    "RetrievalScores",
    "Throughput",
    "ZeroShotScores",
    "progress_bar",
]

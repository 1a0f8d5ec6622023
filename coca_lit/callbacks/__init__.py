"""What happens beside the training step: scores, progress, speed."""

from coca_lit.callbacks.bad_sample_log import BadSampleLog
from coca_lit.callbacks.captions import CaptionScores
from coca_lit.callbacks.evaluation import Evaluation
from coca_lit.callbacks.progress import Throughput, progress_bar
from coca_lit.callbacks.retrieval import RetrievalScores
from coca_lit.callbacks.source_counts import SourceCounts
from coca_lit.callbacks.zeroshot import ZeroShotScores

__all__ = [
    "BadSampleLog",
    "CaptionScores",
    "Evaluation",
    "RetrievalScores",
    "SourceCounts",
    "Throughput",
    "ZeroShotScores",
    "progress_bar",
]

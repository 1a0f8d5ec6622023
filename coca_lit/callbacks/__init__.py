"""What happens beside the training step: scores, progress, speed."""

from coca_lit.callbacks.evaluation import CaptionScores, Evaluation, RetrievalScores, ZeroShotScores
from coca_lit.callbacks.progress import Throughput, progress_bar

__all__ = ["CaptionScores", "Evaluation", "RetrievalScores", "Throughput", "ZeroShotScores", "progress_bar"]

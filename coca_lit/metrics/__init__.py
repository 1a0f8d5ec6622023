"""Scores of captions, retrieval, classification and answers: pure functions, and torchmetrics classes over them.

Nothing else of coca_lit is imported here. The classes (`CaptionMetric`, `ZeroShotAccuracy`) go into any LightningModule
or training loop; several processes may hold any part of the samples, and each sample counts once.
"""

import re


def lower_is_better(score: str) -> bool:
    """Whether a smaller value of the score of this name is the better one; of your own scores the last word says it."""
    own = ("loss", "error", "perplexity", "mse", "rmse", "mae", "wer", "fid")
    last = re.split("[^a-z]+", score.lower())[-1]
    return score.endswith(("median_rank", "CHAIRi", "CHAIRs", "cut_captions")) or last in own


def is_share(score: str) -> bool:
    """Whether the score of this name is a share of images, pixels, texts or answers, in [0, 1]."""
    ends = ("accuracy", "consistency", "miou", "top1", "top5", "exact_match", "novel", "CHAIRi", "CHAIRs", "text_score")
    return "recall@" in score or score.endswith(
        (*ends, "image_score", "group_score", "_precision", "_recall", "cut_captions")
    )

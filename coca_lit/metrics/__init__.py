"""Scores of captions, retrieval, classification and answers: pure functions, and torchmetrics classes over them.

Nothing else of coca_lit is imported here but what projects declare of the names of their scores. The classes
(`CaptionMetric`, `ZeroShotAccuracy`) go into any LightningModule or training loop; several processes may hold any part
of the samples, and each sample counts once.
"""

import re

from coca_lit import extensions


def lower_is_better(score: str) -> bool:
    """Whether a smaller value of the score of this name is the better one; of your own scores the last word says it."""
    declared = extensions.scores().get(score.rpartition("/")[2])
    if declared is not None:
        return declared.lower_is_better
    own = ("loss", "error", "perplexity", "mse", "rmse", "mae", "wer", "fid")
    last = re.split("[^a-z]+", score.lower())[-1]
    return score.endswith(("median_rank", "cut_captions")) or last in own


def is_share(score: str) -> bool:
    """Whether the score of this name is a share of images, pixels or texts, in [0, 1]."""
    declared = extensions.scores().get(score.rpartition("/")[2])
    if declared is not None:
        return declared.share
    ends = ("accuracy", "top1", "top5", "exact_match", "novel")
    return "recall@" in score or score.endswith((*ends, "_precision", "_recall", "cut_captions"))

"""The names of the scores of a run, and runs of whole experiments on scenes."""

from pathlib import Path

import pytest

from coca_lit.data.scenes import render
from helpers.running import TINY, results, run, without_java

OVERLAP = {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"}
STATISTICS = {"exact_match", "mean_length", "vocabulary", "distinct_1", "distinct_2", "novel"}
CAPTION = OVERLAP | STATISTICS | {"CLIPScore", "RefCLIPScore"}
FACTS = {"object_recall", "attribute_recall", "relation_recall"}
ZERO_SHOT = {"top1", "top5", "mean_per_class_recall"}
RETRIEVAL = {f"{way}_recall@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)} | {"t2i_median_rank", "i2t_median_rank"}


def named(name: str, *scores: set[str]) -> set[str]:
    return {f"{name}/{score}" for score in set().union(*scores)}


def check_experiment_on_scenes(patch: pytest.MonkeyPatch, folder: Path, experiment: str, *extra: str) -> None:
    """Two steps of the experiment with the smallest network, and all scores of scenes."""
    without_java(patch)
    patch.setitem(render.DEFAULT_COUNTS, "val", 8)  # where views are cached, of all images
    run(folder, *TINY, f"experiment={experiment}", "data=scenes", *extra, f"data_dir={folder}")  # for cached views
    scores = (RETRIEVAL, CAPTION, FACTS)
    found = {name for name in results(folder) if not name.endswith("_precision")}  # if captions state anything
    assert found == named("scenes", *scores, ZERO_SHOT) | named("compositional", *scores)

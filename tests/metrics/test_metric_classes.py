"""The torchmetrics classes: equal to the pure functions on any number of processes, each sample counted once."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_recall

from coca_lit.distributed import rank, world_size
from coca_lit.metrics import lower_is_better
from coca_lit.metrics.captions import CaptionMetric, caption_scores, caption_table
from coca_lit.metrics.classification import ZeroShotAccuracy, classification_scores
from coca_lit.metrics.uncertainty import Draws

FAST = {"metrics": ("Bleu", "ROUGE_L", "CIDEr"), "tokenize": list}
WORDS = ["red", "blue", "dog", "cat", "runs", "sits", "on", "the", "green", "grass"]
COUNT = 11  # samples, so that they do not divide evenly; ids are numbers and strings
IDS = [i if i % 3 else f"image {i}" for i in range(COUNT)]


def shares() -> list[list[int]]:
    """This process's batches of positions. The samples are padded by repeated ones, as a DistributedSampler does."""
    padded = [*range(COUNT), *range(-COUNT % (world_size() * 4))]
    own = padded[rank() :: world_size()]
    return [own[:2], own[2:]]


def texts() -> tuple[list[str], list[list[str]]]:
    """A prediction and references for each sample; with a line break and letters that JSON escapes."""
    predictions = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 5)) for i in range(COUNT)]
    references = [
        [" ".join(WORDS[(i * k + j) % len(WORDS)] for k in range(1, 6)) for j in range(i % 3 + 1)] for i in range(COUNT)
    ]
    references[3] = [predictions[3], "größe\nund\u2028😀 \ud800"]
    return predictions, references


def caption_metric(table: bool) -> tuple[dict[str, float], dict[str, str], dict[str, Draws]]:
    metric = CaptionMetric(table=table, **FAST)
    predictions, references = texts()
    for part in shares():
        domains = ["near" if i % 2 else "far" for i in part] if table else None
        metric.update([IDS[i] for i in part], [predictions[i] for i in part], [references[i] for i in part], domains)
    return metric.compute(), metric.not_run, metric.draws


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.slow
def test_captions(on_ranks, world: int, table: bool) -> None:
    predictions, references = (dict(zip(IDS, part, strict=True)) for part in texts())
    if table:
        domains = {id: "near" if i % 2 else "far" for i, id in enumerate(IDS)}
        expected, not_run, draws = caption_table(references, predictions, domains, **FAST)
    else:
        scores = caption_scores(references, predictions, **FAST)
        expected, not_run, draws = scores | {"exact_match": 1 / COUNT}, {}, {}
    assert expected["exact_match"] == pytest.approx(1 / COUNT)
    for found, missing, resampled in [caption_metric(table)] if world == 1 else on_ranks(world, caption_metric, table):
        assert list(found) == list(expected)
        assert found == pytest.approx(expected, rel=1e-12)  # the order of the images may differ
        assert missing == not_run
        assert resampled.keys() == draws.keys()


def only_first_rank() -> dict[str, float]:
    """All samples on one process: the other has seen none."""
    predictions, references = texts()
    captions = CaptionMetric(**FAST)
    if rank() == 0:
        captions.update(IDS, predictions, references)
    return captions.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_process_without_samples(on_ranks) -> None:
    alone = only_first_rank()
    assert on_ranks(2, only_first_rank) == [alone, alone]


def fails() -> str:
    metric = CaptionMetric(metrics=["CIDEr"], tokenize=broken)
    metric.update([rank()], ["a"], [["b"]])
    with pytest.raises(RuntimeError) as error:
        metric.compute()
    return str(error.value)


def broken(texts: Sequence[str]) -> list[str]:
    raise RuntimeError("no Java")


def test_an_error_reaches_every_process(on_ranks) -> None:
    assert on_ranks(2, fails) == ["no Java"] * 2


def similarities() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(COUNT) % 7
    return torch.randn(COUNT, 7, generator=generator) + torch.nn.functional.one_hot(labels, 7), labels


def accuracy_metric() -> dict[str, float]:
    similarity, labels = similarities()
    metric = ZeroShotAccuracy()
    for part in shares():
        metric.update(similarity[part], labels[part], [IDS[i] for i in part])
    return metric.compute()


@pytest.mark.parametrize("world", [1, 3])
def test_accuracy(on_ranks, world: int) -> None:
    expected = classification_scores(*similarities())
    assert 0.2 < expected["top1"] < expected["top5"] < 1
    for found in [accuracy_metric()] if world == 1 else on_ranks(world, accuracy_metric):
        assert found == expected


def test_accuracy_equals_that_of_torchmetrics_but_for_ties_and_absent_classes() -> None:
    similarity, labels = similarities()
    ours = classification_scores(similarity, labels)

    def theirs(similarity: Tensor, labels: Tensor) -> dict[str, float]:
        micro: dict[str, Any] = {"num_classes": 7, "average": "micro"}
        return {
            "top1": multiclass_accuracy(similarity, labels, **micro).item(),
            "top5": multiclass_accuracy(similarity, labels, top_k=5, **micro).item(),
            "mean_per_class_recall": multiclass_recall(similarity, labels, num_classes=7, average="macro").item(),
        }

    assert ours == pytest.approx(theirs(similarity, labels), abs=1e-6)
    # A model that finds all classes alike gets the first class right in theirs, and nothing in ours.
    collapsed = torch.zeros(3, 7), torch.tensor([0, 0, 6])
    assert classification_scores(*collapsed)["top1"] == 0
    assert theirs(*collapsed)["top1"] == pytest.approx(2 / 3)
    # A class without images that is predicted by mistake lowers their mean over classes.
    absent = torch.eye(7)[[0, 1, 2]], torch.tensor([0, 1, 1])
    assert classification_scores(*absent)["mean_per_class_recall"] == pytest.approx((1 + 1 / 2) / 2)
    assert theirs(*absent)["mean_per_class_recall"] == pytest.approx((1 + 1 / 2) / 3)


def test_names_say_which_way_scores_are_better() -> None:
    for score in ("mine/error", "mine/FID", "val/perplexity", "x/t2i_median_rank", "val/caption_loss"):
        assert lower_is_better(score)
    for score in ("x/CIDEr", "x/t2i_recall@1", "mine/right_answer", "mine/power"):
        assert not lower_is_better(score)

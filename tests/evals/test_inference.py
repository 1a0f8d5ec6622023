"""Evaluation inputs are the same on any number of ranks, with images that do not divide evenly."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from coca_lit.data.datasets.classification import Classification
from coca_lit.errors import DataError
from coca_lit.evals import Evaluation, Settings
from coca_lit.evals.captions import CaptionScores
from coca_lit.evals.classification import ZeroShotScores
from coca_lit.evals.inference import caption_images, embed_pairs
from coca_lit.evals.retrieval import RetrievalScores
from coca_lit.metrics.retrieval import recall_at_k
from helpers.evaluating import make_model, records


def evaluate() -> dict[str, Any]:
    model = make_model()
    images, texts, image_of_text = embed_pairs(model, records(), batch_size=2)
    return {
        "captions": caption_images(model, records(), batch_size=2),
        "images": images,
        "texts": texts,
        "image_of_text": image_of_text,
        "recall": recall_at_k(images @ texts.T, image_of_text, ks=(1, 5)),
        "training": model.training,
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return evaluate()


def test_any_number_of_ranks_gives_the_same(on_ranks, alone: dict[str, Any]) -> None:
    for result in on_ranks(3, evaluate):
        for name in ("captions", "recall", "training"):
            assert result[name] == alone[name], name
        for name in ("images", "texts", "image_of_text"):
            torch.testing.assert_close(result[name], alone[name], atol=1e-6, rtol=0)


def test_scores_do_not_need_collectives_of_the_host(tmp_path: Path) -> None:
    """As where NCCL is the only backend."""
    labels = {record.id: i % 2 for i, record in enumerate(records())}
    evaluations: list[Evaluation] = [
        CaptionScores("captions", records()),
        ZeroShotScores("kinds", Classification(records(), labels, ("red", "blue"), ("a {}",))),
    ]
    alone = [evaluation.evaluate(make_model(), Settings(tmp_path)) for evaluation in evaluations]
    dist.init_process_group("cuda:gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert [evaluation.evaluate(make_model(), Settings(tmp_path)) for evaluation in evaluations] == alone
    finally:
        dist.destroy_process_group()


def test_captions_that_are_drawn_are_the_same_each_time() -> None:
    model, options = make_model(), {"strategy": "sample"}
    first, again = (caption_images(model, records(), batch_size=2, options=options) for _ in range(2))
    assert first == again
    assert len(set(first.values())) > 1
    given = [options | {"generator": torch.Generator().manual_seed(seed)} for seed in (1, 2)]
    assert len({str(caption_images(model, records(), batch_size=2, options=own)) for own in given}) == 2


def test_one_by_one_gives_the_same(alone: dict[str, Any]) -> None:
    model = make_model().eval()
    texts = [caption for record in records() for caption in record.captions]
    assert list(alone["captions"]) == [record.id for record in records()]
    assert len(set(alone["captions"].values())) > 1
    torch.testing.assert_close(alone["texts"], torch.cat([model.encode_text(model.tokenizer(t)) for t in texts]))
    assert alone["image_of_text"].tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5, 6]
    assert alone["training"]


@pytest.mark.parametrize("evaluation", [CaptionScores, RetrievalScores, Evaluation])
def test_records_that_cannot_be_scored_are_refused_before_training(evaluation: type[Evaluation]) -> None:
    with pytest.raises(DataError, match="mine"):
        evaluation("mine", [])
    bare = [record._replace(captions=()) if i in (2, 4) else record for i, record in enumerate(records())]
    if evaluation is Evaluation:  # of one's own scores
        assert evaluation("mine", bare).records == bare
        return
    with pytest.raises(DataError, match=r"2 of 7 .*'mine'.*'image 2'"):
        evaluation("mine", bare)

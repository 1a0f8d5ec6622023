"""The loss and the score, against loops over pairs; training on two ranks and in micro-batches, against that on one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from my_method.evaluation import PairCosines
from my_method.objective import Nearness

from coca_lit.data.batch import Batch, padded
from coca_lit.data.scenes.render import scene_records
from coca_lit.evals.base import Settings
from coca_lit.evals.inference import embed_images, embed_texts
from coca_lit.models import create_model
from coca_lit.testing import Ranks, check_two_ranks_and_micro_batches, own_batch, trained_with

CAPTIONS = ["a large red circle", "a small blue square below a green ring", "the pink star"]


@torch.no_grad()
def test_the_loss_equals_a_loop_over_pairs() -> None:
    torch.manual_seed(0)
    net = create_model("coca_tiny").eval()
    tokens, lengths = padded(net.tokenizer.encode_batch(CAPTIONS), net.tokenizer.pad_id)
    images = torch.randint(0, 256, (len(CAPTIONS), 3, 32, 32), dtype=torch.uint8)
    batch = Batch(images, tokens, lengths, CAPTIONS)
    objective = Nearness(target=0.1)
    objective.build(net)
    out = net(images, tokens, lengths, needs=objective.needs)
    total = 0.0
    for image, text in zip(net.encode_image(images), net.encode_text(tokens), strict=True):
        total += max(0.0, 0.1 - float(image @ text))
    assert objective(net, batch, out)["nearness"].item() == pytest.approx(total / len(CAPTIONS), rel=1e-5)


@torch.no_grad()
def test_the_score_is_the_mean_cosine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = create_model("coca_tiny").eval()
    records = scene_records("val")[:3]
    total = 0.0
    for image, record in zip(embed_images(net, records), records, strict=True):
        total += float((embed_texts(net, record.captions) @ image).mean())
    scores = PairCosines("scenes", records).scores(net, records, Settings(tmp_path))
    assert scores["nearness"] == pytest.approx(total / 3, rel=1e-5)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as started:
        yield started


def trained(micro_batch_size: int | None, weight: float = 1.0) -> dict[str, torch.Tensor]:
    return trained_with(Nearness(weight), own_batch, 1.0, micro_batch_size)


def test_ranks_and_micro_batches_change_nothing(ranks: Ranks) -> None:
    check_two_ranks_and_micro_batches(ranks, trained)

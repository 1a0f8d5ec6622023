"""Collectives, and a whole CoCa under DistributedDataParallel, on real gloo processes."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from coca_lit.distributed import (
    broadcast_object,
    gather,
    gather_objects,
    logsumexp_over_ranks,
    max_over_ranks,
    rank,
    step_exchange,
    sum_over_ranks,
    world_size,
)
from coca_lit.lit_module import CoCaLit
from coca_lit.models import create_model
from coca_lit.testing import ENCODER, Step, own_batch
from coca_lit.training.optim import AdamW
from coca_lit.training.trainer import ddp_options
from helpers.slow import slow

STEPS = 3


def collectives() -> dict[str, Any]:
    x = torch.full((2, 3), float(rank()), requires_grad=True)
    gathered = gather(x)
    (gathered * torch.arange(gathered.shape[0])[:, None]).sum().backward()
    return {
        "world": world_size(),
        "gathered": gathered[:, 0].tolist(),
        "gradient": x.grad[:, 0].tolist(),
        "sum": sum_over_ranks(torch.tensor([1.0, rank()])).tolist(),
        "logsumexp": logsumexp_over_ranks(torch.tensor([math.log(1 + rank()), 1000.0])).tolist(),
        "max": max_over_ranks([1, -rank()]),
        "objects": gather_objects({"rank": rank()}),
        "broadcast": broadcast_object(f"from {rank()}"),
    }


def test_collectives_on_two_ranks(on_ranks) -> None:
    for r, result in enumerate(on_ranks(2, collectives)):
        assert result == {
            "world": 2,
            "gathered": [0, 0, 1, 1],
            "gradient": [4 * r, 4 * r + 2],  # rows 2r and 2r + 1, from the losses of both ranks
            "sum": [2, 1],
            "logsumexp": pytest.approx([math.log(3), 1000 + math.log(2)]),
            "max": [1, 0],
            "objects": [{"rank": 0}, {"rank": 1}],
            "broadcast": "from 0",
        }


def steps_told() -> dict[str, Any]:
    step_exchange.reset()
    told = []
    for step in range(3):
        step_exchange.tell([step * rank(), -rank()])
        device = step_exchange.exchange(torch.tensor([float(rank()), float("nan")])) if step else None
        told.append(step_exchange.heard())
    assert device is not None
    return {"told": told, "device": device[:, 0].tolist(), "again": step_exchange.heard()}


def test_numbers_of_a_step_take_one_collective(on_ranks) -> None:
    """Of the host and the device together, or of the host alone; a rank's NaN spoils no number of another one."""
    for result in on_ranks(2, steps_told):
        assert result == {"told": [[0, 0], [1, 0], [2, 0]], "device": [0, 1], "again": []}


def train(model: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Trainable weights and statistics after a few steps with plain gradient descent."""
    torch.manual_seed(0)
    net = create_model("coca_tiny", **model).train()
    module = CoCaLit(net, AdamW(lr=0.0), **options)
    options_of_ddp = ddp_options(has_schedule=False, same_graph=True)
    step_module = DistributedDataParallel(Step(module), **options_of_ddp) if world_size() > 1 else Step(module)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        step_module(own_batch(net, step)).backward()
        optimizer.step()
    trained = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    return trained | {name: b for name, b in net.named_buffers() if "running" in name}


CLIP = {"decoder_layers": 0, "pooler_queries": 1}
SIGLIP = {"contrastive": "siglip"}


@pytest.mark.parametrize(
    ("model", "options", "world"),
    [
        (ENCODER, {}, 2),
        (ENCODER | {"pooler": "parallel"}, {"caption_weight": 0}, 3),
        (ENCODER, {"contrastive_weight": 0}, 2),
        ({}, {"freeze": ["image_encoder"]}, 2),
        *slow(
            (ENCODER, {}, 3),
            (ENCODER, {"caption_weight": 0}, 2),
            (ENCODER | {"pooler": "parallel"}, {"contrastive_weight": 0}, 2),
            (ENCODER | {"pooler": "cascade", "cls_mask": "legacy"}, {"contrastive_weight": 0}, 3),
            (ENCODER | {"pooler": "cascade", "cls_mask": "legacy"}, {"caption_weight": 0}, 2),
            (ENCODER | CLIP, {}, 3),
            (ENCODER | SIGLIP, {}, 3),
            (ENCODER | CLIP | SIGLIP, {}, 2),
            (ENCODER | SIGLIP, {"contrastive_weight": 0}, 2),
            (ENCODER, {"freeze": ["image_encoder"]}, 2),
            (ENCODER, {"freeze": ["text", "decoder"]}, 3),
        ),
    ],
)
def test_training_on_several_ranks_equals_one_process(
    on_ranks, model: dict[str, Any], options: dict[str, Any], world: int
) -> None:
    """From the second step on, DistributedDataParallel also raises for a trainable parameter that gets no gradient,
    as in OpenCLIP's recipe for MS-COCO, which has a contrastive weight of 0.
    """
    expected = train(model, options)
    for result in on_ranks(world, train, model, options):
        torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)

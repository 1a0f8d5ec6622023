"""Optimizers of timm on weights that FSDP2 shards over two processes: the steps of one process, and exact resume."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from timm.optim import muon
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from coca_lit.distributed import rank, world_size
from coca_lit.errors import ConfigError
from coca_lit.models import CoCa, create_model
from coca_lit.testing import ENCODER
from coca_lit.training.optim import Timm
from coca_lit.training.sharding import FullySharded, shard

pytestmark = pytest.mark.slow  # five optimizers on two processes

LR, SAMPLES, STEPS = 1e-3, 4, 2
IN_FP32 = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
NAMES = ("muon", "lion", "adopt", "nadamw")
TINY = {**ENCODER, "text_layers": 1, "decoder_layers": 1}
COLOURS = ("red", "blue", "green", "yellow")


def built(name: str) -> tuple[CoCa, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = create_model("coca_tiny", **TINY)
    if world_size() > 1:
        shard(net, init_device_mesh("cpu", (world_size(),)))
    return net, Timm(name, lr=LR, weight_decay=0.1)(net)


def train(net: CoCa, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Each process has its share of the samples; means over equal shares average to the mean over all.

    Muon orthogonalises in fp32 here: in bf16 rounding alone turns its updates of these matrices by a third.
    """
    share = SAMPLES // world_size()
    own = slice(rank() * share, (rank() + 1) * share)
    for step in steps:
        numbers = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (SAMPLES, 3, 32, 32), generator=numbers, dtype=torch.uint8)
        out = net(images[own], net.tokenizer([f"a {colour} circle" for colour in COLOURS])[own])
        similarity = out.logit_scale * (out.image_features * out.text_features).sum(-1).mean()
        captions = F.cross_entropy(out.logits, out.labels, reduction="sum") / share
        optimizer.zero_grad()
        (captions - similarity).backward()
        with mock.patch.object(muon, "zeropower_via_newtonschulz", IN_FP32):
            optimizer.step()


def weights(net: CoCa) -> dict[str, Tensor]:
    return {name: p.full_tensor() if world_size() > 1 else p.detach() for name, p in net.named_parameters()}


def sharded(folder: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Of each optimizer the weights after all steps, in one go and with a resume in the middle."""
    found = {}
    for name in NAMES:
        net, optimizer = built(name)
        train(net, optimizer, range(STEPS // 2))
        strategy, file = FullySharded(), folder / f"{name}{rank()}.ckpt"
        saved = {"state_dict": weights(net), "optimizer_states": [strategy.optimizer_state(optimizer)]}
        torch.save(saved, file)
        train(net, optimizer, range(STEPS // 2, STEPS))
        again, resumed = built(name)
        strategy.model, strategy.optimizers = again, [resumed]
        strategy.load_checkpoint(file)
        train(again, resumed, range(STEPS // 2, STEPS))
        found[name] = weights(net), weights(again)
    for name in ("mars", "kron"):
        with pytest.raises(ConfigError, match=f"{name} .*muon, lion"):
            built(name)
    return found


@pytest.fixture(scope="module")
def on_two(on_ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first, second = on_ranks(2, sharded, tmp_path_factory.mktemp("sharded"))
    assert first.keys() == second.keys()
    return first


@pytest.mark.parametrize("name", NAMES)
def test_sharded_steps_are_those_of_one_process_and_resume_exactly(name: str, on_two: dict[str, Any]) -> None:
    net, optimizer = built(name)
    start = {key: weight.clone() for key, weight in weights(net).items()}
    train(net, optimizer, range(STEPS))
    found, resumed = on_two[name]
    for key, expected in weights(net).items():
        assert torch.equal(found[key], resumed[key]), key
        if not key.endswith("kv.bias"):  # that of keys has a gradient of 0, whose rounding these optimizers normalise
            assert (found[key] - expected).norm() < 1e-3 * (expected - start[key]).norm(), key

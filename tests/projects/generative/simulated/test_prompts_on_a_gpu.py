"""A training step of captions behind prompts on a simulated GPU."""

import torch
from compared_steps import compare, make_batch, pair
from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.models import CoCa
from coca_lit.models.packing import to_device
from coca_lit.projects.generative.objectives import ParallelPrediction, PrefixPrompts


def behind_prompts(net: CoCa, batch: Batch) -> Tensor:
    objective = PrefixPrompts(["we see", "the small picture of"])
    objective.build(net)
    objective.ids = to_device(objective.ids, net.device)  # as Lightning does before the first step
    torch.manual_seed(0)
    return objective(net, batch)["prefixed"]


def in_parallel(net: CoCa, batch: Batch) -> Tensor:
    objective = ParallelPrediction(share=1.0)
    objective.build(net)
    return objective(net, batch)["parallel"]


def test_captions_behind_prompts() -> None:
    nets = pair()
    compare(nets, make_batch(nets[0]), behind_prompts)


def test_captions_in_parallel() -> None:
    nets = pair()
    compare(nets, make_batch(nets[0]), in_parallel)

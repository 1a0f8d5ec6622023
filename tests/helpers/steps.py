"""Training steps of a rank, with its part of a batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coca_lit.data.batch import Batch
from coca_lit.distributed import rank, world_size
from coca_lit.lit_module import CoCaLit
from coca_lit.models import create_model
from coca_lit.training.objectives import Objective
from coca_lit.training.optim import AdamW

PAIRS = 6
ENCODER = {
    "image_encoder": "vit_base_patch32_clip_224",
    "image_encoder_args": {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2},
}


class Step(nn.Module):
    """The training step as the forward pass, which is what Lightning wraps in DistributedDataParallel."""

    def __init__(self, module: CoCaLit) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> Tensor:
        return self.module.training_step(batch, 0)


def own_batch(model: nn.Module, step: int) -> Batch:
    """This rank's part of six pairs with captions of very different lengths."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (PAIRS, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(4, model.tokenizer.vocab_size, (PAIRS, 20), generator=generator)
    lengths = torch.tensor([20, 12, 3, 5, 4, 9])
    tokens[torch.arange(20) >= lengths[:, None]] = model.tokenizer.pad_id
    share = PAIRS // world_size()
    own = slice(rank() * share, (rank() + 1) * share)
    return Batch(images[own], tokens[own, : lengths[own].max()], lengths[own], [""] * share)


def with_further_captions(model: nn.Module, step: int) -> Batch:
    """`own_batch` with two further captions of each image."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(4, model.tokenizer.vocab_size, (PAIRS, 2, 18), generator=generator)
    lengths = torch.randint(3, 19, (PAIRS, 2), generator=generator)
    tokens[torch.arange(18) >= lengths[..., None]] = model.tokenizer.pad_id
    share = PAIRS // world_size()
    own = slice(rank() * share, (rank() + 1) * share)
    extras = {"further_tokens": tokens[own], "further_lengths": lengths[own]}
    return own_batch(model, step)._replace(extras=extras)


def trained_with(
    objective: Objective,
    batch: Callable[[nn.Module, int], Batch],
    contrastive_weight: float,
    micro_batch_size: int | None,
    **network: Any,
) -> dict[str, Tensor]:
    """Weights after two steps with a further objective, on this rank's part of each batch, of a network with these
    arguments.
    """
    torch.manual_seed(0)
    net = create_model("coca_tiny", **ENCODER, **network).train()
    weights, objectives = (contrastive_weight, 2.0), {"further": objective}
    module = CoCaLit(net, AdamW(lr=0.0), 0, *weights, micro_batch_size=micro_batch_size, objectives=objectives)
    step: nn.Module = Step(module)
    if world_size() > 1:
        step = DistributedDataParallel(step)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for i in range(2):
        optimizer.zero_grad()
        step(batch(net, i)).backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


def check_two_ranks_and_micro_batches(on_ranks: Any, trained: Callable[..., dict[str, Tensor]]) -> None:
    """`trained(micro_batch_size, weight=…)` gives the same on two ranks and in micro-batches, and its weight counts."""
    expected = trained(None)
    unlike = trained(None, weight=0.1)
    assert any((value - unlike[name]).abs().max() > 1e-4 for name, value in expected.items())
    for found in [trained(2), *on_ranks(2, trained, None), *on_ranks(2, trained, 1)]:
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)

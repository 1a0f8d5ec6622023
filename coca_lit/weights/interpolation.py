"""Interpolating the weights of two models (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903)."""

import torch

from coca_lit.errors import check_number
from coca_lit.models.clip import CLIP
from coca_lit.models.coca import CoCa
from coca_lit.weights.computation import difference


@torch.no_grad()
def interpolate(model: CoCa | CLIP, before: CoCa | CLIP, weight: float) -> None:
    """Moves `model` to weight · model + (1 - weight) · before, running statistics of batch norms included.

    Args:
        before: the model from which `model` was finetuned.
        weight: between 0 (before) and 1 (unchanged).

    Raises:
        ValueError: the weight is out of range, or the models do not have the same tensors, or compute different things
            with them.
    """
    check_number("weight", weight, at_least=0, at_most=1)
    ours, theirs = model.state_dict(), before.state_dict()
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            raise ValueError(f"the models have different architectures: '{name}' is not the same in both")
    if model.tokenizer.spec != before.tokenizer.spec:
        raise ValueError("the models have different vocabularies: their token ids mean different words")
    if differs := difference(model, before):
        fact, here, there = differs
        raise ValueError(
            f"the models compute different things: {fact} is {here!r} in the one and {there!r} in the other"
        )
    if isinstance(model, CoCa) and isinstance(before, CoCa):
        tied = [m.config["tied_embeddings"] for m in (model, before)]
        if tied[0] != tied[1]:
            raise ValueError(f"the models have different architectures: tied_embeddings is {tied[0]} and {tied[1]}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:  # tied tensors once, unlike the state dict
        if name in theirs and tensor.is_floating_point():
            tensor.copy_(torch.lerp(theirs[name], tensor, weight))

"""Digests of weights: results computed with other weights or other settings get another name and are never mixed."""

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from coca_lit.weights.computation import facts


def digest(about: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """32 hexadecimal digits, equal for equal descriptions and tensors that are equal by name and bit for bit."""
    found = hashlib.sha256(about.encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def fingerprint(model: nn.Module) -> str:
    """The digest of a model: equal for the same architecture with the same weights, whatever file they came from."""
    about = getattr(model, "config", None) or facts(model)  # a CLIP has no `config`
    return digest(json.dumps(about, sort_keys=True), model.state_dict().items())

"""A digest of weights, to name what was computed with them."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest(about: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """32 hexadecimal digits, equal for equal descriptions and tensors of equal names, types, shapes and bits."""
    found = hashlib.sha256(about.encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]

"""Which model made a file: a digest of architecture and weights, so that results of two models are never mixed."""

import hashlib
import json

import torch

from coca_lit.models import CoCa, DualEncoder


def fingerprint(model: DualEncoder) -> str:
    """Equal for models of the same configuration with the same weights, bit for bit, whatever file they came from."""
    parts = sorted({type(part).__name__ for part in model.modules()})  # tells a CLIP with QuickGELU from one with GELU
    about = model.config if isinstance(model, CoCa) else parts
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]

"""Writes a trained model as the package holds it: in int8, a quarter of its size.

    python experiments/photos/quantise.py CHECKPOINT FILE

Matrices and kernels become int8 with a scale in fp32 for each row of outputs, whose largest magnitude becomes 127.
Biases, norms and running statistics become fp16, single numbers stay. A tied vocabulary projection is left out.
`coca_lit.load_model` reads the file (`coca_lit/weights/load.py`).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from coca_lit.models import CoCa
from coca_lit.weights import MODEL_KEY
from coca_lit.weights.intact import save_tensors
from coca_lit.weights.load import PROJECTION, SCALES, load_model, unshared_copies


def quantised(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in int8 and fp16.

    Raises:
        ValueError: a number is too large for fp16.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.ndim < 2:
            found[name] = tensor.half() if tensor.numel() > 1 and tensor.is_floating_point() else tensor
            continue
        scales = tensor.flatten(1).abs().amax(dim=1).clamp(min=1e-12) / 127  # (rows,)
        found[name] = (tensor / scales.view(-1, *[1] * (tensor.ndim - 1))).round().to(torch.int8)
        found[f"{name}{SCALES}"] = scales
    if wrong := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise ValueError(f"'{wrong[0]}' has a number that is too large for fp16")
    return found


def save_quantised(model: CoCa, path: Path) -> None:
    """Writes the file, with the architecture in its metadata as in any other of ours."""
    state = unshared_copies(model.state_dict())
    if model.config.tied_embeddings:
        del state[PROJECTION]
    save_tensors(quantised(state), path, {MODEL_KEY: json.dumps(model.config.stored())})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    save_quantised(load_model(options.checkpoint), options.file)
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

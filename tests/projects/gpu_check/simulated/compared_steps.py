"""A training step on the simulated GPU, beside the same step on the CPU."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from simulated_gpu import DeviceTensor, counted, on_cpu, to_gpu
from torch import Tensor

from coca_lit.data.batch import Batch
from coca_lit.models import CoCa, create_model

LENGTHS = [5, 9, 17, 6, 7, 12, 24, 4]  # of captions; more than a tenth of the grid would be padding
VIT = {"image_encoder": "vit_tiny_patch16_224", "image_encoder_args": {"depth": 1, "embed_dim": 32, "num_heads": 2}}
SMALL: dict[str, Any] = {"text_layers": 1, "decoder_layers": 1, "pooler_queries": 5, **VIT}

IN_TIMM = "naflex/encoder.py:"  # which calls timm: it copies the places of each shape in a batch to the device


def make_batch(net: CoCa, lengths: list[int] = LENGTHS) -> Batch:
    generator = torch.Generator().manual_seed(0)
    size, count = net.image_size, len(lengths)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(4, 40, (count, max(lengths)), generator=generator)
    tokens[torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]] = 0
    return Batch(images, tokens, torch.tensor(lengths), [str(i) for i in range(count)])


def on_gpu(batch: Batch) -> Batch:
    """As a loader with pinned memory and Lightning hand it over."""
    pinned = batch._replace(images=batch.images.pin_memory(), tokens=batch.tokens.pin_memory())
    return pinned.to(torch.device("cuda", 0))


def pair(**overrides: Any) -> tuple[CoCa, CoCa]:
    """The same network on the CPU and on the GPU."""
    torch.manual_seed(0)
    net = create_model("coca_tiny", **{**SMALL, **overrides}).train()
    return net, to_gpu(copy.deepcopy(net))


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, by the size of the largest number."""
    found, expected = on_cpu(found).float(), on_cpu(expected).float()
    return ((found - expected).abs().max() / (expected.abs().max() + 1e-9)).item() if expected.numel() else 0.0


Step = Callable[[CoCa, Batch], Tensor]


def compare(nets: tuple[CoCa, CoCa], batch: Batch, step: Step, kind: torch.dtype | None = None) -> Any:
    """Checks loss and gradients, and that nothing waits; returns what was counted."""
    (cpu, gpu), tolerance = nets, 1e-4 if kind is None else 0.1
    with torch.autocast("cpu", kind or torch.bfloat16, enabled=kind is not None):
        expected = step(cpu, batch)
    expected.backward()
    with counted() as recorder:
        with torch.autocast("cuda", kind or torch.bfloat16, enabled=kind is not None):
            found = step(gpu, on_gpu(batch))
        found.backward()
    assert isinstance(found, DeviceTensor)
    waits = {what: times for what, times in recorder.waits.items() if IN_TIMM not in what[1]}
    assert not waits, waits
    assert distance(found, expected) < tolerance / 5
    grads = [(p.grad, q.grad) for p, q in zip(gpu.parameters(), cpu.parameters(), strict=True)]
    assert [p is None for p, _ in grads] == [q is None for _, q in grads]
    largest = max(q.abs().max().item() for _, q in grads if q is not None)
    for p, q in grads:
        if q is not None:
            assert (on_cpu(p).float() - q.float()).abs().max().item() < tolerance * max(largest, 1e-3)
    return recorder

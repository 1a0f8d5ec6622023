"""What a plan assumes: the GPUs, and how well they are used."""

from collections.abc import Sequence
from typing import NamedTuple

from coca_lit.errors import check_number, suggest

# Seconds of the host to launch an operation, gradients included: 5 to 10 µs in PyTorch without compilation or graphs.
LAUNCH = 6e-6
MEASURED = 0.155  # share of an A100's peak in OpenCLIP's published training of L/14: 75.5 samples/s of 642 GFLOP


class Gpu(NamedTuple):
    """Peaks from the makers' data sheets: dense products, accumulated in fp32. A training step reaches a share of them
    between `MEASURED` and an assumption, from published runs: 0.15 to 0.4 on an A100, 0.2 to 0.3 on an H100.
    """

    bf16: float  # TFLOP/s
    tf32: float  # TFLOP/s, for products in fp32
    memory: float  # GB
    utilisation: float  # share of the peak in a good run


GPUS = {
    "A100-40GB": Gpu(312, 156, 40, 0.30),
    "A100": Gpu(312, 156, 80, 0.30),
    "H100": Gpu(989, 494, 80, 0.22),
    "H200": Gpu(989, 494, 141, 0.22),
    "L40S": Gpu(362, 183, 48, 0.30),
    "RTX-4090": Gpu(165, 83, 24, 0.30),
}


class Settings:
    """
    Args:
        gpus: keys of `GPUS`.
        utilisation: share of the peak that a training step reaches; None: from `MEASURED` to each GPU's own.
        caption_tokens: mean length of the captions, start and end included.
        devices: number of GPUs in the run; None takes it from the trainer if that has a number; else 8, or
            as many as get 16 pairs of a batch each.
        samples: samples in the whole training; None takes them from the config.

    Raises:
        ValueError: an unknown GPU or none, or a number out of its range.
    """

    def __init__(
        self,
        gpus: Sequence[str],
        utilisation: float | None,
        caption_tokens: int,
        devices: int | None,
        samples: float | None,
    ) -> None:
        if not gpus:
            raise ValueError(f"gpus must name at least one of {', '.join(GPUS)}")
        for name in gpus:
            if name not in GPUS:
                raise ValueError(f"gpus: there is no '{name}'{suggest(name, GPUS)} Known: {', '.join(GPUS)}")
        check_number("caption_tokens", caption_tokens, whole=True, at_least=2)
        if utilisation is not None:
            check_number("utilisation", utilisation, above=0, at_most=1)
        if devices is not None:
            check_number("devices", devices, whole=True, at_least=1)
        if samples is not None:
            check_number("samples", samples, above=0)
        self.gpus, self.utilisation, self.caption_tokens = list(gpus), utilisation, caption_tokens
        self.devices, self.samples = devices, samples

    def shares_of_peak(self, gpu: str) -> tuple[float, float]:
        """The least and the most that is assumed."""
        if self.utilisation is not None:
            return self.utilisation, self.utilisation
        return MEASURED, GPUS[gpu].utilisation

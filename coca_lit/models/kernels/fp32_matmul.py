"""Which library multiplies fp32 matrices on a CPU.

PyTorch takes MKL, which runs at half speed on processors that are not Intel's; oneDNN does not. The switch that takes
oneDNN also permits it to round to bf16, which it does where the processor multiplies bf16 in hardware (AMX) and nowhere
else, so the products are checked before it is used.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LARGEST_ERROR = 1e-6  # relative, of a product of 512 terms: both libraries stay under 6e-7
FASTER = 1.3  # less is within what two timings differ by, and the choice must be the same after a resume
# In smaller networks the kernels that oneDNN makes for every new number of packed rows cost more than they save.
SMALLEST_NETWORK = 20_000_000  # parameters


def choose_fp32_matmul(parameters: int) -> str:
    """Switches the fp32 products of this process to oneDNN if that is as exact and clearly faster; says in words what
    was chosen and why.

    Args:
        parameters: number of parameters of the network to train.
    """
    if not torch.backends.mkldnn.is_available():
        return "MKL: this PyTorch has no oneDNN"
    if parameters < SMALLEST_NETWORK:
        return "MKL: the network is small"
    error, seconds = _probe()
    _use_onednn(True)
    onednn_error, onednn_seconds = _probe()
    speed = f"oneDNN: error {onednn_error:.0e} against {error:.0e}, {seconds / onednn_seconds:.1f} times the speed"
    if onednn_error <= LARGEST_ERROR and seconds / onednn_seconds >= FASTER:
        return f"oneDNN ({speed})"
    _use_onednn(False)
    return f"MKL ({speed})"


def keep_fp32_products(before: str) -> None:
    """Takes what `fp32_products` gave in the run that goes on: the two round differently."""
    if torch.backends.mkldnn.is_available():
        _use_onednn(before == "oneDNN")


def fp32_products() -> str:
    """The library in use."""
    backend: Any = torch.backends.mkldnn
    return "oneDNN" if backend.matmul.fp32_precision == "bf16" else "MKL"


def _use_onednn(on: bool) -> None:
    backend: Any = torch.backends.mkldnn  # its attributes are made when it is imported
    backend.matmul.fp32_precision = "bf16" if on else "none"


def _probe() -> tuple[float, float]:
    """Largest relative error of a product and its two gradients against fp64, and the CPU seconds that they take."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 512, generator=generator)
    weight = torch.randn(2048, 512, generator=generator)
    gradient = torch.randn(1024, 2048, generator=generator)
    products: list[Callable[..., Tensor]] = [
        lambda x, weight, gradient: x @ weight.T,
        lambda x, weight, gradient: gradient @ weight,
        lambda x, weight, gradient: gradient.T @ x,
    ]
    exact = [product(x.double(), weight.double(), gradient.double()) for product in products]
    best, found = float("inf"), []
    for _ in range(5):
        start = time.process_time()
        found = [product(x, weight, gradient) for product in products]
        best = min(best, time.process_time() - start)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    return max(errors), best

"""Settings of the whole process: the switch of all kernels, the memory that is freed, the library of fp32 products."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from coca_lit.errors import check_choice

Fp32Matmul = Literal["auto", "mkl", "onednn"]

# Smaller networks lose more to the kernels that oneDNN builds for every new number of packed rows than they gain.
SMALLEST_NETWORK = 20_000_000  # parameters
LARGEST_ERROR = 1e-6  # relative, of a product of 512 terms in fp32: both libraries stay below 6e-7
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_on = True


def enable(on: bool = True) -> None:
    """Switches all kernels on or off in this process, for models that exist already as well.

    When off, only plain PyTorch computes. Settings of the process's memory stay.
    """
    global _on
    _on = on
    if not on:
        _set_onednn(False)


def enabled() -> bool:
    return _on


@contextmanager
def disabled() -> Iterator[None]:
    """Within, nothing but plain PyTorch computes. The library of fp32 products stays."""
    global _on
    before = _on
    _on = False
    try:
        yield
    finally:
        _on = before


def keep_freed_memory() -> None:
    """Keeps freed blocks in the process, from here to its end.

    glibc returns large blocks to the kernel, which must clear them again in the next step: up to half of the time of a
    convolutional encoder on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if _on and sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            mallopt(option, value)


def use_fp32_matmul(library: Fp32Matmul, parameters: int | None = None) -> str:
    """Sets the library that multiplies fp32 matrices on a CPU, and returns its name and the reason in words.

    PyTorch's default is MKL, which runs at half speed on processors that are not Intel's. Nothing is timed: `auto`
    takes oneDNN where kernels are enabled, the processor is an x86 one that is not Intel's, the network is large
    enough, and products are exact. The switch that takes oneDNN also permits it to round fp32 to bf16, which it does
    where the processor multiplies bf16 matrices in hardware (AMX); such a processor is never given oneDNN.

    Args:
        library: mkl, onednn, or auto.
        parameters: number of parameters of the network to train; None for a large one.

    Raises:
        ValueError: an unknown library, or oneDNN was demanded where it is missing or rounds.
    """
    check_choice("fp32_matmul", library, get_args(Fp32Matmul))
    if library == "mkl":
        _set_onednn(False)
        return "mkl, as configured"
    obstacle = _obstacle()
    if library == "onednn":
        if obstacle is not None:
            raise ValueError(f"fp32_matmul=onednn cannot be used: {obstacle}; use auto or mkl")
        _set_onednn(True)
        return "onednn, as configured"
    obstacle = obstacle or _reason_for_mkl(parameters)
    _set_onednn(obstacle is None)
    return "onednn: MKL is slow on this processor" if obstacle is None else f"mkl: {obstacle}"


@contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """Within, a GPU computes fp32 products and convolutions in fp32, also in a training, which lets it round their
    inputs to TF32. Errors of TF32 in contrastive logits change the gradients by up to 1e-3.
    """
    backends: Any = (torch.backends.cuda.matmul, torch.backends.cudnn) if device.type == "cuda" else ()
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def fp32_matmul() -> Literal["mkl", "onednn"]:
    """The library in use."""
    backend: Any = torch.backends.mkldnn  # its attributes are made at import
    return "onednn" if backend.is_available() and backend.matmul.fp32_precision == "bf16" else "mkl"


def _set_onednn(on: bool) -> None:
    backend: Any = torch.backends.mkldnn
    if backend.is_available():
        backend.matmul.fp32_precision = "bf16" if on else "none"


def _obstacle() -> str | None:
    """What rules oneDNN out, if anything does."""
    if not _on:
        return "kernels are switched off"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    if torch.cpu._is_amx_tile_supported() or not _is_exact():
        return "oneDNN would round fp32 to bf16 on this processor"
    return None


def _reason_for_mkl(parameters: int | None) -> str | None:
    if parameters is not None and parameters < SMALLEST_NETWORK:
        return "the network is small"
    if not torch.backends.mkl.is_available() or not _x86_name():
        return "the processor is unknown"
    return "MKL is fast on this processor" if on_intel() else None


def on_intel() -> bool:
    """Whether the processor is Intel's, for which MKL is written; False if it is unknown."""
    return "Intel" in _x86_name()


def _x86_name() -> str:
    processor: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # since PyTorch 2.12
    return str(processor.get("cpu_name", "")) if processor.get("architecture") == "x86_64" else ""


def _is_exact() -> bool:
    """Whether oneDNN multiplies in fp32, found by one product of a millisecond."""
    before = fp32_matmul()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=generator)
    weight = torch.randn(512, 64, generator=generator)
    exact = x.double() @ weight.double()
    _set_onednn(True)
    error = ((x @ weight).double() - exact).norm() / exact.norm()
    _set_onednn(before == "onednn")
    return error.item() <= LARGEST_ERROR

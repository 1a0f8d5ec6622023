"""Settings of the process: which library multiplies fp32 matrices, by what PyTorch tells of the processor."""

import resource
import sys
from collections.abc import Iterator

import pytest
import torch

from coca_lit.models import kernels
from coca_lit.models.kernels import process
from coca_lit.models.kernels.process import LARGEST_ERROR, SMALLEST_NETWORK
from helpers.forking import called

AMD = {"architecture": "x86_64", "cpu_name": "AMD EPYC 9B14"}
INTEL = {"architecture": "x86_64", "cpu_name": "Intel(R) Xeon(R) Platinum 8481C"}


@pytest.fixture(autouse=True)
def switch_back() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before
    process._on = True


def machine(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, str], amx: bool = False, exact: bool = True
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: capabilities["architecture"] == "x86_64")
    monkeypatch.setattr(process, "_is_exact", lambda: exact)


@pytest.mark.parametrize(
    ("capabilities", "amx", "exact", "parameters", "chosen"),
    [
        (AMD, False, True, SMALLEST_NETWORK, "onednn: MKL is slow on this processor"),
        (AMD, False, True, None, "onednn: MKL is slow on this processor"),
        (AMD, False, True, SMALLEST_NETWORK - 1, "mkl: the network is small"),
        (AMD, True, True, None, "mkl: oneDNN would round fp32 to bf16 on this processor"),
        (AMD, False, False, None, "mkl: oneDNN would round fp32 to bf16 on this processor"),
        (INTEL, False, True, None, "mkl: MKL is fast on this processor"),
        ({"architecture": "aarch64"}, False, True, None, "mkl: the processor is unknown"),
    ],
    ids=["AMD", "AMD, any network", "small", "AMX", "rounds", "Intel", "ARM"],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch,
    capabilities: dict[str, str],
    amx: bool,
    exact: bool,
    parameters: int | None,
    chosen: str,
) -> None:
    machine(monkeypatch, capabilities, amx, exact)
    assert kernels.use_fp32_matmul("auto", parameters) == chosen
    assert kernels.fp32_matmul() == chosen.partition(":")[0]


@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_a_library_can_be_demanded(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    machine(monkeypatch, INTEL)
    assert kernels.use_fp32_matmul(library) == f"{library}, as configured"
    assert kernels.fp32_matmul() == library


def test_onednn_is_refused_where_it_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, AMD, amx=True)
    with pytest.raises(ValueError, match=r"fp32_matmul=onednn.*bf16"):
        kernels.use_fp32_matmul("onednn")
    assert kernels.fp32_matmul() == "mkl"


def test_switched_off_there_is_no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, AMD)
    kernels.use_fp32_matmul("onednn")
    kernels.enable(False)
    assert kernels.fp32_matmul() == "mkl"
    assert kernels.use_fp32_matmul("auto") == "mkl: kernels are switched off"


def test_whatever_is_chosen_here_is_exact() -> None:
    kernels.use_fp32_matmul("auto")
    x, y = torch.randn(300, 500), torch.randn(500, 700)
    exact = x.double() @ y.double()
    assert ((x @ y).double() - exact).norm() / exact.norm() < LARGEST_ERROR


def test_the_check_of_exactness_sees_rounding() -> None:
    """And leaves the library as it was. Under autocast products round to bf16."""
    assert process._is_exact() or torch.cpu._is_amx_tile_supported()
    with torch.autocast("cpu", torch.bfloat16):
        assert not process._is_exact()
    assert kernels.fp32_matmul() == "mkl"


def pages_of_steps(keep: bool) -> int:
    """Pages that the system provides for steps which hold what they compute until they go back, as training does.

    Blocks are larger than the 32 MiB up to which glibc may keep them unasked.
    """

    def step() -> None:
        y = x = torch.ones(9 * 2**20, requires_grad=True)
        for _ in range(3):
            y = (y * 2).relu()
        y.sum().backward()
        assert x.grad is not None

    kernels.enable(keep)
    kernels.keep_freed_memory()
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
@pytest.mark.slow
def test_freed_memory_stays_with_the_process() -> None:
    """Most pages of a step are of steps before it. Not all: whether a freed block fits a request depends on glibc."""
    returned, kept = (called(pages_of_steps, keep) for keep in (False, True))
    assert kept < returned / 2

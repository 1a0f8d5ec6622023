"""The fp32 products of a CPU: oneDNN is taken where it is exact and faster, and nowhere else."""

from collections.abc import Iterator

import pytest
import torch

from coca_lit.models.kernels import fp32_matmul as fp32

LARGE = fp32.SMALLEST_NETWORK


@pytest.fixture(autouse=True)
def switch_back() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def onednn_is_on() -> bool:
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"


@pytest.mark.parametrize(
    ("error", "speed", "chosen"),
    [(4e-7, 2.0, True), (2e-3, 2.0, False), (4e-7, 1.1, False)],
    ids=["exact and faster", "rounds to bf16", "hardly faster"],
)
def test_choice(error: float, speed: float, chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp32, "_probe", lambda: (error, 1 / speed) if onednn_is_on() else (3e-7, 1.0))
    reason = fp32.choose_fp32_matmul(LARGE)
    assert onednn_is_on() == chosen
    assert reason.startswith("oneDNN" if chosen else "MKL")


def test_whatever_is_chosen_here_is_exact() -> None:
    fp32.choose_fp32_matmul(LARGE)
    x, y = torch.randn(300, 500), torch.randn(500, 700)
    exact = x.double() @ y.double()
    assert ((x @ y).double() - exact).norm() / exact.norm() < fp32.LARGEST_ERROR


def test_a_small_network_is_left_alone() -> None:
    assert "small" in fp32.choose_fp32_matmul(LARGE - 1)
    assert not onednn_is_on()


def test_a_run_that_goes_on_keeps_its_products() -> None:
    for products in ("oneDNN", "MKL"):
        fp32.keep_fp32_products(products)
        assert fp32.fp32_products() == products

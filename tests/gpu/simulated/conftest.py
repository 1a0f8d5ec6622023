"""The tests here need the simulated GPU, a process of their own: tests/gpu/test_simulation.py runs them."""

import sys

import pytest

collect_ignore_glob = [] if "simulated_gpu" in sys.modules else ["test_*.py"]


@pytest.fixture(autouse=True)
def with_kernels() -> None:
    """A run may have switched them off in this process."""
    from coca_lit.models import kernels

    kernels.enable()


@pytest.fixture(autouse=True)
def without_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton knows nothing of the simulated device."""
    monkeypatch.setattr("coca_lit.losses.caption._has_fused_kernel", lambda hidden: False)

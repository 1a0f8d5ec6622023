"""How the process is set up."""

import ctypes
import subprocess
import sys

import pytest

FREED_AND_TAKEN = """
import resource, torch
from coca_lit.cli.runtime import configure_libraries
torch.zeros(1)
if {kept}:
    configure_libraries(1)
torch.ones(2**24)  # 64 MiB, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc only")
def test_freed_memory_stays_with_the_process() -> None:
    """Counted in pages that the kernel had to provide: 5 times 64 MiB, or next to none."""
    pages = {}
    for kept in (False, True):
        command = [sys.executable, "-c", FREED_AND_TAKEN.format(kept=kept)]
        pages[kept] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert pages[True] < 100 < pages[False]

"""Settings that commands share."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, types
from coca_lit.cli.runtime import keep_imports

class Kept:
    def __del__(self):
        print("collected")

kept = Kept()
kept.itself = kept
del kept
sys.modules.update(dict.fromkeys(sys.argv[1:], types.ModuleType("a stand-in")))
keep_imports()
"""


@pytest.mark.parametrize(("modules", "said"), [((), ""), (("triton",), "collected\n")])
def test_what_was_imported_is_collected_at_the_end_where_triton_would_report_it(
    modules: tuple[str, ...], said: str
) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *modules], capture_output=True, text=True, timeout=100)
    assert done.stderr == ""
    assert done.stdout == said

"""`coca-gpu-check`: what a GPU computes, beside the CPU, and how fast. One command, one GPU, about ten minutes.

Every check is a line with PASS or FAIL. `gpu_check.json` holds them with the measurements, `gpu_check.md` holds
tables to paste into a page.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from coca_lit.runs.launch import isolate, print_any_text


def gpu_check(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `coca-gpu-check`; exit code 1 if a check failed."""
    isolate()
    print_any_text()
    parser = argparse.ArgumentParser("coca-gpu-check", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder for JSON and Markdown")
    parser.add_argument("--quick", action="store_true", help="measure the smallest model alone")
    options = parser.parse_args(arguments)
    print("looking for a GPU …", flush=True)

    import torch

    if not torch.cuda.is_available():
        sys.exit("error: coca-gpu-check needs a GPU, and PyTorch finds none: torch.cuda.is_available() is False")

    try:
        options.output.mkdir(parents=True, exist_ok=True)  # now, as the checks take minutes
        TemporaryFile(dir=options.output).close()
    except OSError as error:
        sys.exit(f"error: --output: cannot write {options.output}: {error.strerror or error}")

    from coca_lit.projects.gpu_check.checks import check_gpu

    if check_gpu(options.output, options.quick):
        sys.exit(1)

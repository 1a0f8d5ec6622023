"""`coca-report outputs/A` rewrites the report of a run; given several runs, or a sweep, it compares them. Of two
runs with zero-shot accuracy on the same data sets it also draws the gaps, sorted: second run against first.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def report(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `coca-report`. Mistakes of the user are one sentence on standard error and exit code 1."""
    parser = argparse.ArgumentParser("coca-report", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of finished runs, or of a sweep")
    parser.add_argument(
        "--output", type=Path, help="folder for the comparison (default: the sweep's folder, else outputs/comparison)"
    )
    parser.add_argument("--objective", help="score that ranks the runs (default: the first headline score)")
    options = parser.parse_args(arguments)

    from coca_lit.errors import UserError
    from coca_lit.report.page import write_comparison, write_report

    try:
        first = options.folders[0]
        if len(options.folders) > 1:
            print(write_comparison(options.folders, options.output or Path("outputs/comparison"), options.objective))
        elif (first / "results.json").is_file():
            print(write_report(first))
        else:
            print(write_comparison([first], options.output or first, options.objective))
    except UserError as error:
        sys.exit(f"error: {error}")

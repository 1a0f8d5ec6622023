"""`coca-report outputs/A` rewrites the report of a run; given several runs, or a sweep, it compares them. Of two
runs it draws the differences, sorted: second run against first.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from coca_lit.runs.launch import isolate
from coca_lit.tools.commands import command_for, further_commands, started

EXAMPLE = "for example: coca-report outputs/demo   or, to compare: coca-report outputs/a outputs/b"


def report(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `coca-report`. Mistakes of the user are one sentence on standard error and exit code 1."""
    isolate()
    words = sys.argv[1:] if arguments is None else arguments
    handed_over = command_for("report", words)
    if handed_over is not None:
        handed_over(words)
        return
    parser = argparse.ArgumentParser(
        "coca-report",
        description=__doc__,
        epilog=EXAMPLE + further_commands("report"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="*", help="folders of finished runs, or of a sweep")
    parser.add_argument(
        "--output", type=Path, help="folder for the comparison (default: the sweep's folder, else outputs/comparison)"
    )
    parser.add_argument("--objective", help="score that ranks the runs (default: the first headline score)")
    options = parser.parse_args(words)
    if not options.folders:
        sys.exit(f"error: name the folder of a run; {EXAMPLE}   (more: coca-report --help)")

    with started("coca-report", OSError):
        from coca_lit.errors import DataError, suggest
        from coca_lit.reading import printable
        from coca_lit.tools.report.page import write_comparison, write_report
        from coca_lit.tools.report.runs import find_runs
        from coca_lit.tools.report.terminal import summary

        first = options.folders[0]
        runs, failed = find_runs(options.folders)
        scores = [*dict.fromkeys(name for run in runs for name in run.results)]
        objective = options.objective
        if objective is not None and objective not in scores:
            raise DataError(f"no run has the score '{objective}'{suggest(objective, scores)}")
        several = len(options.folders) > 1
        if not several and (first / "results.json").is_file():
            if options.output is not None:
                parser.error("--output is the folder of a comparison; the report of one run is written into its folder")
            page = write_report(first)
        else:
            output = options.output or (Path("outputs/comparison") if several else first)
            page = write_comparison(runs, failed, output, objective)
        print(f"{summary(runs, failed, objective)}\n\n{printable(str(page))}".lstrip("\n"))

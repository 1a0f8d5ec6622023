"""`coca-report --scaling RUNS`: fits and draws the score against the training compute."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from coca_lit.tools.commands import started


def report_scaling(words: Sequence[str]) -> None:
    """Answers the words of `coca-report`, of which `--scaling` is one."""
    parser = argparse.ArgumentParser("coca-report --scaling", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of finished runs, or of a sweep")
    parser.add_argument("--scaling", action="store_true", help="names this report")
    parser.add_argument("--output", type=Path, help="folder for the figure and the table (default: the first folder)")
    parser.add_argument("--objective", help="score that the law describes (default: the first recall or accuracy)")
    parser.add_argument(
        "--hold-out",
        type=float,
        default=4.0,
        help="predict what has more than 1/N of the compute (default: %(default)s)",
    )
    parser.add_argument("--published", type=Path, help="results.parquet of LAION's scaling study, to draw beside")
    options = parser.parse_args(words)
    if options.hold_out < 1:
        parser.error(f"--hold-out must be at least 1, not {options.hold_out}")
    with started("coca-report", OSError):
        from coca_lit.projects.scaling.law import write_scaling
        from coca_lit.reading import printable
        from coca_lit.tools.report.runs import find_runs

        runs, _ = find_runs(options.folders)
        output = options.output or options.folders[0]
        print(write_scaling(runs, output, options.objective, options.hold_out, options.published))
        print(printable(str(output / "scaling.png")))

"""`coca-score --judgments`: a table of scores and how well people agree with them."""

from collections.abc import Sequence
from pathlib import Path

from coca_lit.errors import DataError
from coca_lit.metrics.uncertainty import Draws, difference
from coca_lit.progress import ProgressBar
from coca_lit.reading import printable
from coca_lit.runs.scores import score_name
from coca_lit.tools.score.agreement import TAUS, Agreement, agreement, reference_scores
from coca_lit.tools.score.judgments import read_judgments

USUAL = "CIDEr"  # with which other scores are compared
TITLES = {"tau_b": "Kendall's tau-b", "tau_c": "Kendall's tau-c"}


def judge_files(files: Sequence[Path], captions: Path | None = None) -> dict[str, float]:
    """Prints how well scores against references agree with the judgements of each file; returns the numbers as
    "FILE/tau_b_CIDEr".

    Raises:
        DataError: see `read_judgments`.
    """
    everything = [read_judgments(path, captions) for path in files]  # mistakes first: scoring takes minutes
    if len({judged.name for judged in everything}) < len(everything):
        raise DataError("two files of judgements have the same name, by which their scores are told apart: rename one")
    scores: dict[str, float] = {}
    for judged in everything:
        images = len({candidate.image for candidate in judged.candidates})
        parts = [f"{judged.name}: {len(judged.candidates):,} captions of {images:,} images"]
        if judged.grades:
            judges = len({grade.judge for grade in judged.grades})
            several = f" of {judges} judges, each a point of its own (mean grades give other numbers)"
            parts.append(f"{len(judged.grades):,} grades" + (several if judges > 1 else ""))
        if judged.preferences:
            parts.append(f"{len(judged.preferences):,} pairs of which people prefer one")
        if judged.left_out:
            parts.append(f"{judged.left_out:,} left out: {judged.why_left_out}")
        print(printable("; ".join(parts)), flush=True)
        with ProgressBar("SPICE", "captions") as bar:
            found, not_run = reference_scores(judged, progress=bar.reach)
        of = agreement(judged, found)
        for measure in of.by:
            for line in _table(of, measure):
                print(line)
        for name, reason in not_run.items():
            print(printable(f"{name} not run: {reason}"))
        for measure, by_score in of.by.items():
            scores |= {f"{judged.name}/{measure}_{name}": draws.score for name, draws in by_score.items()}
        print(flush=True)
    return scores


def _table(of: Agreement, measure: str) -> list[str]:
    """A line for each score, with its interval and its difference from CIDEr."""
    found = of.by[measure]
    rows = [(measure_name(measure), "", "", f"minus {USUAL}", "", "p")]
    for name, draws in found.items():
        row = (score_name(name).removesuffix(", %"), *_cells(draws))
        if name == USUAL:
            rows.append((*row, "", "", ""))
            continue
        gap = difference(found[USUAL], draws)
        rows.append((*row, f"{100 * gap.value:+.1f}", f"[{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]", f"{gap.p:.3f}"))
    if measure in of.people:
        rows.append(("people with each other", *_cells(of.people[measure]), "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return ["", *(f"  {line.rstrip()}" for line in lines)]


def measure_name(measure: str) -> str:
    """For readers: "Kendall's tau-b, times 100", "accuracy on pairs HC, %"."""
    if measure in TAUS:
        return f"{TITLES[measure]}, times 100"
    return f"accuracy on pairs {measure.removesuffix('accuracy').strip()}".rstrip() + ", %"


def _cells(draws: Draws) -> tuple[str, str]:
    low, high = draws.interval()
    return f"{100 * draws.score:.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]"

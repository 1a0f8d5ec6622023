"""Recorded numbers: every table on a page is what the CSV of its study says, and every study is complete."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from experiments import report, study
from experiments.benchmarks import report as benchmarks

ROOT = Path(__file__).resolve().parents[2]
RECORDED = sorted(path.parent.name for path in ROOT.glob("experiments/*/results.csv"))


def shown_before(name: str, layout: benchmarks.Layout) -> str:
    """The table in the README, if it is what the rows of its CSV said before some of them, or none, were added."""
    readme = (benchmarks.FOLDER / "README.md").read_text()
    (shown,) = (match[0] for match in study.MARK.finditer(readme) if match[2] == f"benchmarks/{name}")
    rows = benchmarks.recorded(name)
    for count in range(len(rows), 0, -1):
        with suppress(KeyError, IndexError):  # a case that only one side has measured
            if (table := benchmarks.table(rows[:count], layout)) in shown:
                return table
    raise AssertionError(f"{name}: run report.py")


def test_tables_are_those_of_the_csvs() -> None:
    tables: dict[str, str] = {}
    for name, reported in report.STUDIES.items():
        if name == "benchmarks":  # their CSVs grow with whoever measures
            tables |= {f"benchmarks/{of}": shown_before(of, benchmarks.LAYOUTS[of]) for of in benchmarks.IN_THE_PAGE}
        else:
            tables |= reported.tables()
    shown = []
    for page in study.PAGES:
        assert study.with_tables(page.read_text(), tables) == page.read_text(), f"{page}: run report.py"
        shown += [match[2] for match in study.MARK.finditer(page.read_text())]
    assert set(tables) <= set(shown)
    for match in (m for page in study.PAGES for m in study.MARK.finditer(page.read_text())):
        assert match[2] in tables or match[0].splitlines()[1] == "Not recorded yet."


@pytest.mark.parametrize("name", RECORDED)
def test_a_study_has_all_that_the_contract_asks_for(name: str) -> None:
    assert name in report.STUDIES
    assert f"experiments/report.py {name}" in (ROOT / "experiments" / name / "run.sh").read_text()
    tables = {match[2]: page for page in study.PAGES for match in study.MARK.finditer(page.read_text())}
    page = next(page for table, page in tables.items() if table.partition("/")[0] == name)
    assert f"({os.path.relpath(page, ROOT / 'experiments')}" in (ROOT / "experiments" / "README.md").read_text()
    opening = page.read_text().partition(f"<!-- table:{name}")[0]
    question, answer = opening.rfind("**Question.**"), opening.rfind("**Answer.**")
    assert 0 <= question < answer, f"{page}: the table of {name} stands below a question and its answer"

"""Breaks lines of the package that are drawn at random, and lists what no test notices.

    pip install cosmic-ray                                   # and Python 3.12
    python experiments/mutants/drawn.py record               # which lines each test runs; a run of all tests
    python experiments/mutants/drawn.py draw --seed 1        # a row of drawn.csv for each
    python experiments/mutants/drawn.py run                  # the tests that run the line
    python experiments/mutants/drawn.py check                # what noticed a mutant passes without it

Every folder of the package gives as many lines as any other. A line is drawn among those that cosmic-ray's operators
can change, then a kind of operator, then one of its changes. `run` goes on where it was interrupted.
"""

import argparse
import ast
import contextlib
import csv
import fcntl
import os
import random
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.mutants import lines
from experiments.mutants.mutants import NOBODY, OUT_OF_TIME, ROOT, RUNNING, copied, first_failure, prepare

RESULTS = Path(__file__).with_name("drawn.csv")
RECORDED = ROOT / "outputs" / "mutants" / "lines.sqlite"
LIMIT_S, LIMIT_ALONE_S, CHECK_S = 900, 300, 3600  # for the tests of a mutant, for one test, for all that noticed
LAST = 10**9  # a line after all
FIRST_S = 20  # tests of this time together run first: they notice most
LIBRARIES = (
    "hypothesis",
    "duckdb",
    "pyarrow.parquet",
    "webdataset",
    "matplotlib.pyplot",
    "onnxruntime",
    "transformers",
)
NO_START = "(pytest cannot start)"
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
SCOPES = FUNCTIONS | ast.ClassDef


class Row(NamedTuple):
    """A row of `drawn.csv`: what an operator does to one place of a file, and what became of it.

    `noticed_by` is the first test that failed, of `tests` that run the line. `seconds` is empty before the mutant has
    run; `verdict` is written by hand for a survivor.
    """

    file: str
    line: str
    operator: str
    occurrence: str
    mutation: str
    noticed_by: str = NOBODY
    tests: str = ""
    seconds: str = ""
    verdict: str = ""


def draw(count: int, seed: int) -> None:
    """Fills up the rows that have run, with changes of distinct lines, as many from every folder of the package."""
    rng = random.Random(seed)
    rooms: dict[str, dict[tuple[str, int], list[Row]]] = {}
    for path in sorted((ROOT / "coca_lit").rglob("*.py")):
        if "template" in path.parts:  # what `coca-new` copies
            continue
        parents = path.relative_to(ROOT / "coca_lit").parts[:-1]
        room = "/".join(parents[: 2 if parents[:1] == ("tools",) else 1])
        for change in changes(str(path.relative_to(ROOT))):
            rooms.setdefault(room, {}).setdefault((change.file, int(change.line)), []).append(change)
    rows = [row for row in read() if row.seconds]
    while len(rows) < count:
        lines = rooms[[*rooms][len(rows) % len(rooms)]]
        of_line = lines.pop(rng.choice(sorted(lines)))
        kind = rng.choice(sorted({_kind(change) for change in of_line}))
        change = rng.choice([change for change in of_line if _kind(change) == kind])
        source = (ROOT / change.file).read_text()
        changed = mutated(source, change)
        assert changed is not None
        if _code(changed) not in ("", _code(source)):
            rows.append(change._replace(mutation=_difference(source, changed)))
    write(rows)


def changes(file: str) -> Iterator[Row]:
    """Every change of a file by an operator without arguments; texts are changed by none."""
    from cosmic_ray.ast import get_ast_from_path
    from cosmic_ray.operators.provider import OperatorProvider

    provider = OperatorProvider()
    nodes = [*_nodes(get_ast_from_path(ROOT / file))]
    for name in sorted(provider):
        if name.startswith("Variable") or "_BitOr_" in name:  # need arguments; are nearly all in annotations
            continue
        operator = provider[name]()
        places = [node for node in nodes for _ in operator.mutation_positions(node)]
        yield from (Row(file, str(node.start_pos[0]), name, str(i), "") for i, node in enumerate(places))


def _nodes(node: Any) -> Iterator[Any]:
    """In the order of cosmic-ray's own walk."""
    yield node
    for child in getattr(node, "children", ()):
        yield from _nodes(child)


def _kind(change: Row) -> str:
    """Without this, `+` would be drawn eleven times as often as a number: it has eleven replacements."""
    return change.operator.partition("_")[0]


def mutated(source: str, change: Row) -> str | None:
    """The source with a change; None where it has no such place."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    changed: str | None = mutate_code(source, OperatorProvider()[change.operator](), int(change.occurrence))
    return changed


def _code(source: str) -> str:
    """What Python runs, without annotations; "" if it cannot: the bare `*` of a signature counts as an operator."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        for name in {"annotation", "returns"} & set(node._fields):
            setattr(node, name, None if name == "returns" or isinstance(node, ast.arg) else ast.Constant(None))
    return ast.dump(tree)


def _difference(before: str, after: str) -> str:
    pairs = zip(before.splitlines(), after.splitlines(), strict=False)
    old, new = next(pair for pair in pairs if pair[0] != pair[1])
    return f"{old.strip()} → {new.strip()}"


def record_lines() -> None:
    """Runs all tests but the blocks of pages, and writes `RECORDED`: which tests run a line, and the time of each."""
    with tempfile.TemporaryDirectory(prefix="lines_") as folder:
        tree, notes = copied(Path(folder, "tree")), Path(folder, "notes")
        notes.mkdir()
        (tree / "sitecustomize.py").write_text(lines.SITECUSTOMIZE)
        environment = {lines.FOLDER: str(notes), lines.PACKAGE: str(tree / "coca_lit"), "PYTHONPATH": str(tree)}
        chosen = ["-m", "slow or not slow", "--ignore", "tests/docs/test_blocks.py"]
        command = [sys.executable, "-m", "pytest", "-p", "experiments.mutants.lines", *chosen]
        subprocess.run(command, cwd=tree, env=os.environ | environment)  # a test that fails has run its lines, too
        write_lines(notes)


def write_lines(notes: Path) -> None:
    """Writes `RECORDED` from what the processes of the tests wrote."""
    RECORDED.parent.mkdir(parents=True, exist_ok=True)
    RECORDED.unlink(missing_ok=True)
    run = set(lines.recorded(notes))
    counts = Counter(test for test, _ in run)
    tests = [(test, seconds, counts[test]) for test, seconds in lines.seconds(notes).items()]
    with contextlib.closing(sqlite3.connect(RECORDED)) as base, base:
        base.execute("CREATE TABLE tests (test TEXT PRIMARY KEY, seconds REAL, lines INTEGER)")
        base.executemany("INSERT INTO tests VALUES (?, ?, ?)", tests)
        base.execute("CREATE TABLE runs (test TEXT, line TEXT)")
        base.executemany("INSERT INTO runs VALUES (?, ?)", run)
        base.execute("CREATE INDEX by_line ON runs (line, test)")


def tests_of(row: Row) -> dict[str, float]:
    """Tests that run the statement of a row, with the time of each. Those that run little else come first.

    A statement outside functions runs at the import, in whichever test comes first. Its tests are those that run any
    line of the class or the file around it, or of a file that has the name which it assigns.
    """
    tree, number = ast.parse((ROOT / row.file).read_text()), int(row.line)
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt | ast.ExceptHandler) and node.lineno <= number <= (node.end_lineno or node.lineno)
    ]
    innermost = max(around, key=lambda node: node.lineno, default=None)
    functions = [node for node in around if isinstance(node, FUNCTIONS) and node.body[0].lineno <= number]
    if innermost is None:  # a decorator
        places = [(row.file, 1, LAST)]
    elif functions:
        places = [(row.file, innermost.lineno, _end_of_head(innermost))]
    elif isinstance(innermost, SCOPES):  # a default
        places = [(row.file, innermost.body[0].lineno, innermost.end_lineno or number)]
    else:
        names = {
            node.id for node in ast.walk(innermost) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        users = [
            str(path.relative_to(ROOT))
            for path in (ROOT / "coca_lit").rglob("*.py")
            if any(re.search(rf"\b{name}\b", path.read_text()) for name in names)
        ]
        places = [(file, 1, LAST) for file in {row.file, *users}]
    with contextlib.closing(sqlite3.connect(RECORDED)) as base:
        found = set[str]()
        for file, first, last in places:
            run = base.execute(
                "SELECT test, CAST(substr(line, ?) AS INTEGER) AS number FROM runs WHERE line GLOB ?"
                " AND number BETWEEN ? AND ?",
                (len(file) + 2, f"{file}:*", first, last),
            )
            found |= {test for test, _ in run}
        times = dict(base.execute("SELECT test, seconds FROM tests ORDER BY lines, seconds"))
    return {test: time for test, time in times.items() if {test, test.partition("::")[0]} & found}


def _end_of_head(node: ast.stmt | ast.ExceptHandler) -> int:
    """The last line of a statement without the statements in it."""
    body = getattr(node, "body", None)
    return max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno


def run(first: int, count: int) -> None:
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        suite = Suite(copied(Path(folder)))
        for row in read()[first : first + count]:
            if row.seconds:
                continue
            if not (ROOT / row.file).exists():
                print(row.file, "is no longer there", flush=True)
                continue
            began, path = time.monotonic(), suite.tree / row.file
            changed = mutated(source := path.read_text(), row)
            if changed is None or _difference(source, changed) != row.mutation:
                print(row.file, row.line, row.operator, "another line is there now", flush=True)
                continue
            tests = tests_of(row)
            with changed_to(path, changed) as back:
                noticed_by = next(filter(None, (suite.noticing(step, back) for step in _steps(tests))), NOBODY)
            seconds = f"{time.monotonic() - began:.1f}"
            record(row._replace(noticed_by=noticed_by, tests=str(len(tests)), seconds=seconds))
            print(row.file, row.line, row.operator, noticed_by or "SURVIVED", seconds, flush=True)


def _steps(tests: dict[str, float]) -> Iterator[list[str]]:
    """The first tests, then the others."""
    total = 0.0
    first = list[str]()
    for test, duration in tests.items():
        total += duration
        if total < FIRST_S:
            first.append(test)
    others = [test for test in tests if test not in first]
    yield from filter(None, (first, others))


@contextlib.contextmanager
def changed_to(path: Path, text: str) -> Iterator[Callable[[], contextlib.AbstractContextManager[Any]]]:
    """A file says something else for a while; what is yielded puts it back within that while."""
    source = path.read_text()
    path.write_text(text)
    try:
        yield lambda: changed_to(path, source)
    finally:
        path.write_text(source)


class Suite:
    """The tests in a copy of the tree."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        prepare(tree)
        for library in LIBRARIES:
            with contextlib.suppress(ImportError):
                __import__(library)

    def noticing(self, arguments: list[str], back: Callable[[], contextlib.AbstractContextManager[Any]]) -> str:
        """The first test that fails, or that hangs and passes without the mutation."""
        failed = self.failing(arguments, LIMIT_S)
        if failed != OUT_OF_TIME:
            return failed
        last = (self.tree / RUNNING).read_text()
        if not self.failing([last], LIMIT_ALONE_S):
            return NOBODY  # it was only the last within the limit
        with back():
            return NOBODY if self.failing([last], LIMIT_ALONE_S) else last

    def failing(self, arguments: list[str], seconds: float) -> str:
        arguments = [argument.removeprefix("tests/") for argument in arguments]
        try:
            return first_failure(self.tree, ["-m", "slow or not slow", *arguments], seconds)
        except ValueError as error:
            return NOBODY if "ended with 5" in str(error) else NO_START  # 5: no test is selected


def check() -> None:
    """The tests that noticed a mutant pass without it; prints those that do not."""
    noticing = sorted({row.noticed_by for row in read() if "::" in row.noticed_by})
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        suite = Suite(copied(Path(folder)))
        while failed := suite.failing(noticing, CHECK_S):
            print(f"{failed} fails without any mutation", flush=True)
            noticing.remove(failed)
    print(f"{len(noticing)} tests pass without a mutation")


def read() -> list[Row]:
    with RESULTS.open(newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def write(rows: Iterable[Row]) -> None:
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)


def record(row: Row) -> None:
    """Puts a row in its place; several processes may do so."""
    with RESULTS.open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write([row if row[:4] == other[:4] else other for other in read()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser("draw")
    options.add_argument("--count", type=int, default=150)
    options.add_argument("--seed", type=int, default=0)
    commands.add_parser("record")
    commands.add_parser("check")
    options = commands.add_parser("run")
    options.add_argument("--first", type=int, default=0, help="row")
    options.add_argument("--count", type=int, default=sys.maxsize)
    given = parser.parse_args()
    if given.command == "draw":
        draw(given.count, given.seed)
    elif given.command == "record":
        record_lines()
    elif given.command == "check":
        check()
    else:
        run(given.first, given.count)


if __name__ == "__main__":
    main()

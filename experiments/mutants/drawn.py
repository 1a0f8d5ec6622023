"""Breaks lines of the package that are drawn at random, and lists what no test notices.

    pip install cosmic-ray
    python experiments/mutants/drawn.py draw --count 150     # drawn.csv, with a row for each mutant
    python experiments/mutants/drawn.py run --modules 8      # the test files that are likeliest to notice it
    python experiments/mutants/drawn.py run --survivors      # the whole suite, with the slow tests

Every folder of the package gives as many lines as any other. A line is drawn among those that cosmic-ray's operators
can change, then a kind of operator, then one of its changes. `run` goes on where it was interrupted.
"""

import argparse
import ast
import csv
import fcntl
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.mutants.mutants import NOBODY, OUT_OF_TIME, ROOT, copied, first_failure, prepare

RESULTS = Path(__file__).with_name("drawn.csv")
AT_FIRST = 2  # files of tests; most mutants fail one of them
LIMIT_S = 300  # for a file
NO_START = "(pytest cannot start)"


class Row(NamedTuple):
    """A row of `drawn.csv`: what an operator does to one place of a file, and what became of it.

    `noticed_by` is the first test that failed in `modules` files of tests; `seconds` is empty before the mutant has
    run; `verdict` is written by hand for a survivor.
    """

    file: str
    line: str
    operator: str
    occurrence: str
    mutation: str
    noticed_by: str = NOBODY
    modules: str = ""
    seconds: str = ""
    verdict: str = ""


def draw(count: int, seed: int) -> None:
    """Writes changes of distinct lines, as many from every folder of the package."""
    rng = random.Random(seed)
    rooms: dict[str, dict[tuple[str, int], list[Row]]] = {}
    for path in sorted((ROOT / "coca_lit").rglob("*.py")):
        parents = path.relative_to(ROOT / "coca_lit").parts[:-1]
        room = "/".join(parents[: 2 if parents[:1] == ("tools",) else 1])
        for change in changes(str(path.relative_to(ROOT))):
            rooms.setdefault(room, {}).setdefault((change.file, int(change.line)), []).append(change)
    rows: list[Row] = []
    while len(rows) < count:
        lines = rooms[[*rooms][len(rows) % len(rooms)]]
        of_line = lines.pop(rng.choice(sorted(lines)))
        kind = rng.choice(sorted({_kind(change) for change in of_line}))
        change = rng.choice([change for change in of_line if _kind(change) == kind])
        source = (ROOT / change.file).read_text()
        changed = mutated(source, change)
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


def mutated(source: str, change: Row) -> str:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    changed = mutate_code(source, OperatorProvider()[change.operator](), int(change.occurrence))
    assert changed is not None
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


def related(row: Row) -> list[str]:
    """All files of tests; first those that import a mutant's file, name the function that it is in, or mirror it."""
    tree = ast.parse((ROOT / row.file).read_text())
    line, package = int(row.line), row.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    scopes = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    around = [
        node for node in ast.walk(tree) if isinstance(node, scopes) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    names = [re.compile(rf"\b{node.name}\b") for node in around if not node.name.startswith("__")]
    mirrored = Path(row.file).with_suffix("").parts[1:]

    def distance(path: Path) -> tuple[int, int]:
        text, parts = path.read_text(), path.relative_to(ROOT / "tests").with_suffix("").parts
        alike = sum(a in b for a, b in zip(mirrored, parts, strict=False))
        named = sum(name.search(text) is not None for name in names)
        module = re.search(rf"\b{re.escape(package)}\b(?! import [A-Z_]+$)", text) is not None
        return -(2 * module + 2 * named + alike), len(text)

    paths = sorted((ROOT / "tests").rglob("test_*.py"), key=distance)
    tests = (str(path.relative_to(ROOT / "tests")) for path in paths)
    # Tests of a simulated GPU need a process of their own, which a test starts.
    return [*dict.fromkeys("gpu/test_simulation.py" if "simulated" in test else test for test in tests)]


def run(survivors: bool, modules: int | None, first: int, count: int) -> None:
    passed = {NOBODY, OUT_OF_TIME, NO_START}
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        tree = copied(Path(folder))
        prepare(tree)
        for row in read()[first : first + count]:
            if bool(row.seconds) != survivors or row.noticed_by:
                continue
            tests = related(row)[:modules]
            path, began = tree / row.file, time.monotonic()
            source = path.read_text()
            path.write_text(mutated(source, row))
            try:
                steps = (tests[:AT_FIRST], tests[AT_FIRST:]) if not survivors else (["-m", "slow or not slow", *tests],)
                noticed_by = next(filter(None, (_noticed(tree, step) for step in steps if step)), NOBODY)
            finally:
                path.write_text(source)
            if noticed_by not in passed and _noticed(tree, [noticed_by.removeprefix("tests/")]):
                raise ValueError(f"{noticed_by} fails without any mutation:\n{(tree / 'log').read_text()}")
            passed.add(noticed_by)
            took = f"{time.monotonic() - began:.1f}"
            record(row._replace(noticed_by=noticed_by, modules=str(len(tests)), seconds=took))
            print(row.file, row.line, row.operator, noticed_by or "SURVIVED", took, flush=True)


def _noticed(tree: Path, arguments: list[str]) -> str:
    try:
        return first_failure(tree, arguments, LIMIT_S * len(arguments))
    except ValueError as error:
        return NOBODY if "ended with 5" in str(error) else NO_START  # 5: there are only slow tests


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
    options = commands.add_parser("run")
    options.add_argument("--survivors", action="store_true")
    options.add_argument("--modules", type=int, help="files of tests for each mutant; else all")
    options.add_argument("--first", type=int, default=0, help="row")
    options.add_argument("--count", type=int, default=sys.maxsize)
    given = parser.parse_args()
    if given.command == "draw":
        draw(given.count, given.seed)
    else:
        run(given.survivors, given.modules, given.first, given.count)


if __name__ == "__main__":
    main()

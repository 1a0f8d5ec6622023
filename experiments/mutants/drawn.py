"""Breaks lines of the package that are drawn at random, and lists what no test notices.

    pip install cosmic-ray
    python experiments/mutants/drawn.py draw --count 150     # a row of drawn.csv for each; those that ran stay
    python experiments/mutants/drawn.py run                  # the test files near the line
    python experiments/mutants/drawn.py run --survivors      # then their slow tests, and the package's other tests
    python experiments/mutants/drawn.py check                # what noticed a mutant passes without it

Every folder of the package gives as many lines as any other. A line is drawn among those that cosmic-ray's operators
can change, then a kind of operator, then one of its changes. `run` goes on where it was interrupted.
"""

import argparse
import ast
import contextlib
import csv
import fcntl
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from experiments.mutants.mutants import NOBODY, OUT_OF_TIME, ROOT, RUNNING, copied, first_failure, prepare

RESULTS = Path(__file__).with_name("drawn.csv")
NEAR = 6  # files of tests; most mutants fail one of the first
LIMIT_S, LIMIT_ALONE_S, CHECK_S = 600, 300, 3600  # for files of tests together, for one test, for all that noticed
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
SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Row(NamedTuple):
    """A row of `drawn.csv`: what an operator does to one place of a file, and what became of it.

    `noticed_by` is the first test that failed; `ring` is how far one was looked for: in files of tests "near" the line,
    or also "wide". `seconds` is empty before the mutant has run; `verdict` is written by hand for a survivor.
    """

    file: str
    line: str
    operator: str
    occurrence: str
    mutation: str
    noticed_by: str = NOBODY
    ring: str = ""
    seconds: str = ""
    verdict: str = ""


def draw(count: int, seed: int) -> None:
    """Fills up the rows that have run, with changes of distinct lines, as many from every folder of the package."""
    rng = random.Random(seed)
    rooms: dict[str, dict[tuple[str, int], list[Row]]] = {}
    for path in sorted((ROOT / "coca_lit").rglob("*.py")):
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


def related(row: Row) -> tuple[list[str], list[str], list[str]]:
    """Files of tests, the likeliest first: near a mutant's file, of the same folder, and of the same package.

    Near are those that import the file or a public name of it, or that have its name. Those of the package import
    another part of it.
    """
    tree, line = ast.parse((ROOT / row.file).read_text()), int(row.line)
    module = row.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    package = module.rpartition(".")[0]
    around = [node for node in ast.walk(tree) if isinstance(node, SCOPES) and node.lineno <= line <= _last(node)]
    names = {node.name for node in around if not node.name.startswith("__")}
    public = {node.name for node in tree.body if isinstance(node, SCOPES) and not node.name.startswith("_")}
    exported = {f"{place}.{name}" for place in (package, package.rpartition(".")[0]) for name in public}
    mirrored = Path(row.file).with_suffix("").parts[1:]
    near, folder, wide = list[str](), list[str](), list[str]()

    def distance(path: Path) -> tuple[int, int]:
        text, folder = path.read_text(), path.relative_to(ROOT / "tests").parts[:-1]
        return -sum(re.search(rf"\b{name}\b", text) is not None for name in names) - (folder == mirrored[:-1]), len(
            text
        )

    for path in sorted((ROOT / "tests").rglob("test_*.py"), key=distance):
        test, parts = str(path.relative_to(ROOT / "tests")), path.relative_to(ROOT / "tests").with_suffix("").parts
        imports, beside = _imported(path), parts[:-1] == mirrored[:-1]
        if "simulated" in test or test == "projects/gpu_check/test_simulation.py":
            continue  # a simulated GPU needs a process of its own, which one test starts: see below
        if _has(imports, module) or imports & exported or (beside and mirrored[-1] in parts[-1]):
            near.append(test)
        elif beside:
            folder.append(test)
        elif package != "coca_lit" and _has(imports, package):
            wide.append(test)
    if "gpu_check" in row.file:
        near.append("projects/gpu_check/test_simulation.py")
    near, folder = (near, folder) if near else (folder, [])
    return near[:NEAR], folder, near[NEAR:] + wide


def _last(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


@cache
def _imported(path: Path) -> set[str]:
    """Dotted names: modules, and what is imported from them."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _has(imports: set[str], module: str) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for name in imports)


def run(survivors: bool, first: int, count: int) -> None:
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        suite = Suite(copied(Path(folder)))
        for row in read()[first : first + count]:
            if bool(row.seconds) != survivors or row.noticed_by or row.verdict:
                continue
            if not (ROOT / row.file).exists():
                print(row.file, "is no longer there", flush=True)
                continue
            near, beside, wide = related(row)
            steps = [["-m", "slow", *near, *beside], [*beside, *wide]] if survivors else [near]
            began, path = time.monotonic(), suite.tree / row.file
            changed = mutated(source := path.read_text(), row)
            if changed is None or _difference(source, changed) != row.mutation:
                print(row.file, row.line, row.operator, "another line is there now", flush=True)
                continue
            with changed_to(path, changed) as back:
                noticed_by = next(filter(None, (suite.noticing(step, back) for step in steps if step)), NOBODY)
            seconds = f"{time.monotonic() - began + float(row.seconds or 0):.1f}"
            ring = ("wide" if wide or beside else "slow") if survivors else "near"
            record(row._replace(noticed_by=noticed_by, ring=ring, seconds=seconds))
            print(row.file, row.line, row.operator, noticed_by or "SURVIVED", seconds, flush=True)


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
            return first_failure(self.tree, arguments, seconds)
        except ValueError as error:
            return NOBODY if "ended with 5" in str(error) else NO_START  # 5: no test is selected


def check() -> None:
    """The tests that noticed a mutant pass without it; prints those that do not."""
    noticing = sorted({row.noticed_by for row in read() if "::" in row.noticed_by})
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        suite = Suite(copied(Path(folder)))
        while failed := suite.failing(["-m", "slow or not slow", *noticing], CHECK_S):
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
    commands.add_parser("check")
    options = commands.add_parser("run")
    options.add_argument("--survivors", action="store_true")
    options.add_argument("--first", type=int, default=0, help="row")
    options.add_argument("--count", type=int, default=sys.maxsize)
    given = parser.parse_args()
    if given.command == "draw":
        draw(given.count, given.seed)
    elif given.command == "check":
        check()
    else:
        run(given.survivors, given.first, given.count)


if __name__ == "__main__":
    main()

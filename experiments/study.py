"""Building blocks of the studies: rows of finished runs, tables and figures made of rows, places of tables in pages.

`experiments/report.py` puts them together. A table stands between the lines `<!-- table:NAME -->` and `<!-- /table -->`
of a page in `experiments/` or in the package. Runs are named VARIANT_seedN, which groups the seeds of a variant.
"""

import csv
import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from coca_lit.runs.scores import in_print_units, score_name
from coca_lit.tools.report.tables import Table, markdown

Row = dict[str, str]

EXPERIMENTS = Path(__file__).resolve().parent
PAGES = (*sorted(EXPERIMENTS.rglob("*.md")), *sorted(EXPERIMENTS.parent.glob("coca_lit/**/*.md")))
MARK = re.compile(r"(<!-- table:(\S+) -->\n).*?(<!-- /table -->)", flags=re.DOTALL)
ABOUT = ("run", "seed", "seconds", "commit", "machine", "torch", "command")
DATA = {"scenes": "scenes", "compositional": "unseen combinations", "flickr8k": "photos"}


class TableStudy(NamedTuple):
    """A study with one table, which `table` makes of its rows."""

    results: Path
    table: Callable[[Sequence[Row]], str]

    def tables(self) -> dict[str, str]:
        rows = read_rows(self.results)
        return {self.results.parent.name: self.table(rows)} if rows else {}


class VariantStudy(NamedTuple):
    """A study with one table and one figure that compare variants.

    Attributes:
        results: its CSV; table and figure are named after the folder.
        names: {variant: name for readers}, in their order.
        scores: {column: title}
    """

    results: Path
    names: Mapping[str, str]
    scores: Mapping[str, str]

    def tables(self) -> dict[str, str]:
        rows = self._rows()
        return {self.results.parent.name: by_variant(rows, self.scores)} if rows else {}

    def draw(self) -> None:
        draw_variants(self._rows(), self.scores, self.results.with_name(f"{self.results.parent.name}.png"))

    def _rows(self) -> list[Row]:
        return renamed(read_rows(self.results), self.names)


# Rows


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV; none if it does not exist yet."""
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a CSV with the columns of all rows; missing values stay empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def replace_rows(path: Path, rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> None:
    """Adds rows to a CSV, in place of earlier ones that have the same values in the columns `by`."""
    new = {tuple(str(row[column]) for column in by) for row in rows}
    write_rows(path, [*(old for old in read_rows(path) if tuple(old[column] for column in by) not in new), *rows])


def read_run(folder: Path) -> Row:
    """The facts and scores of a run. A run without results is kept as a failed row."""
    environment = json.loads((folder / "environment.json").read_text())
    config = (folder / "config.yaml").read_text()
    seed = re.search(r"^seed: (\d+)$", config, flags=re.MULTILINE) or re.search(r"_seed(\d+)$", folder.name)
    command = environment.get("command", "")
    # Hydra gets --config-dir as an absolute path. Other paths mean something on one machine only.
    command = re.sub(r"""'hydra\.searchpath=\["file://\S*/(experiments/\w+)"\]'""", r"--config-dir \1", command)
    command = re.sub(r"packed: [^,]+", "packed: FILE", command)  # a tokenizer, tens of thousands of characters
    environment["command"] = re.sub(r"(\w: )/[^\s,}]+", r"\1PATH", re.sub(r"=/\S+", "=PATH", command))
    row = {key: str(environment.get(key, "")) for key in ABOUT} | {"run": folder.name, "seed": seed[1] if seed else ""}
    if speeds := numbers(read_rows(folder / "metrics.csv"), "samples/s"):
        row["samples/s"] = f"{statistics.median(speeds):.1f}"
    results = folder / "results.json"
    scores = json.loads(results.read_text()) if results.exists() else {}
    return row | {name: f"{value:.4f}" for name, value in scores.items()}


def add_runs(rows: Sequence[Row], folders: Sequence[Path]) -> list[Row]:
    """Adds the rows of runs, in place of earlier rows of the same name."""
    return list(({row["run"]: row for row in rows} | {folder.name: read_run(folder) for folder in folders}).values())


def variants(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """{variant: its rows, one per seed}, in the order of their first rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(re.sub(r"_seed\d+$", "", row["run"]), []).append(row)
    return found


def renamed(rows: Sequence[Row], names: Mapping[str, str]) -> list[Row]:
    """The rows of the variants in `names`, {variant: name for readers}, in their order."""
    groups = variants(rows)
    return [row | {"run": row["run"].replace(v, names[v], 1)} for v in names for row in groups.get(v, [])]


def numbers(rows: Sequence[Row], column: str) -> list[float]:
    """The values of a column, scores in the units of papers, without rows that have none."""
    raw = [float(row[column]) for row in rows if row.get(column)]
    return raw if column in ABOUT or column == "samples/s" else [in_print_units(column, value) for value in raw]


# Figures


def draw_variants(rows: Sequence[Row], scores: Mapping[str, str], path: Path) -> None:
    """Draws a panel for each of `scores`, {column: title}: a dot per run and a line at the mean of each variant with
    the score.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    groups = variants(rows)
    shape: dict[str, Any] = {"squeeze": False, "layout": "constrained"}
    longest = 0.06 * max(
        map(len, groups)
    )  # inches of a label, of which the first panel and those with other rows have one
    figure, axes = plt.subplots(
        1, len(scores), figsize=(2 * longest + 1.6 * len(scores), 1 + 0.25 * len(groups)), **shape
    )
    labels: list[str] = []  # of the panel to the left
    for axis, (score, title) in zip(axes[0], scores.items(), strict=True):
        scored = {name: values for name, runs in groups.items() if (values := numbers(runs, score))}
        for place, values in enumerate(scored.values()):
            axis.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6)
            axis.vlines(statistics.mean(values), place - 0.3, place + 0.3, color="tab:blue")
        axis.set_yticks(range(len(scored)), [""] * len(scored) if labels == [*scored] else [*scored], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(textwrap.fill(unit(score, title), 16), fontsize=10)
        axis.grid(alpha=0.3)
        labels = [*scored]
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_lines(panels: Mapping[str, Mapping[str, list[tuple[float, float]]]], x: str, y: str, path: Path) -> None:
    """Draws {panel: {line: its points}}, at most four panels side by side."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    shape: dict[str, Any] = {"squeeze": False, "layout": "constrained"}
    rows = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / rows)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.6 * rows + 0.4), **shape)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker=".", label=label)
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# Tables


def by_variant(rows: Sequence[Row], scores: Mapping[str, str]) -> str:
    """Markdown for a study that compares variants: a line for each, with n, mean ± std of `scores`, {column: title}."""
    groups = variants(rows).items()
    lines = [[name, str(len(runs)), *(mean_std(numbers(runs, score)) for score in scores)] for name, runs in groups]
    return with_about(["variant", "n", *(unit(score, title) for score, title in scores.items())], lines, rows)


def readable(text: str, factor: float = 1) -> str:
    """A number times the factor, with at most four significant digits and commas at thousands; other text as it is."""
    if not re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", text):
        return text
    value = float(text) * factor
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 or not value else f"{value:.2g}"


def unit(score: str, title: str) -> str:
    """The title of a column with the unit of its score."""
    return f"{title}, %" if score_name(score).endswith(", %") else title


def mean_std(values: Sequence[float]) -> str:
    """ "mean ± standard deviation" with four significant digits of the mean at most, the mean alone of a single value,
    nothing of none.
    """
    if not values:
        return ""
    mean = statistics.mean(values)
    digits = 2 if abs(mean) < 100 else 1 if abs(mean) < 1000 else 0
    return f"{mean:.{digits}f}" if len(values) == 1 else f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def with_about(header: Sequence[str], lines: Sequence[Sequence[str]], rows: Sequence[Row]) -> str:
    """A table, and below it where all rows were measured: up to three commits, else two and the number of others, which
    the CSV names beside the commands.
    """

    def all_of(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] for row in rows))

    commits = list(dict.fromkeys(row["commit"] for row in rows))
    more = f" and {len(commits) - 2} others" if len(commits) > 3 else ""
    named = ", ".join(commits[:2] if more else commits) + more
    return f"{markdown(Table('', header, lines))}\n\nCommit {named}, torch {all_of('torch')}, {all_of('machine')}."


def write_tables(tables: Mapping[str, str]) -> None:
    """Writes each table into every page that has a place for it."""
    for page in PAGES:
        old = page.read_text()
        if (new := with_tables(old, tables)) != old:
            page.write_text(new)


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """The text with the tables in their places; places of other tables stay as they are."""
    return MARK.sub(lambda m: f"{m[1]}{tables[m[2]]}\n{m[3]}" if m[2] in tables else m[0], text)

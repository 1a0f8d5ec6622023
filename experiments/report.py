"""Turns finished runs into a study's `results.csv`, and that into the table of its README.

    python experiments/report.py demo outputs/demo_seed*      add or replace the rows of these runs, write the table
    python experiments/report.py demo                         write the table again from results.csv

The table stands between the lines `<!-- table:NAME -->` and `<!-- /table -->`; the README of the project may hold the
same table.
"""

import argparse
import csv
import json
import re
import statistics
from pathlib import Path

EXPERIMENTS = Path(__file__).resolve().parent
HEADLINE = re.compile(r"/(Bleu_4|METEOR|CIDEr|exact_match|\w+_recall@[15]|top1)$")  # the CSV has the other scores too
ABOUT = ["run", "seed", "seconds", "commit", "machine", "torch", "command"]


def read_run(folder: Path) -> dict[str, str]:
    """One row: what the run was, and its scores. A run without results is kept as a failed row."""
    environment = json.loads((folder / "environment.json").read_text())
    seed = re.search(r"^seed: (\d+)$", (folder / "config.yaml").read_text(), flags=re.MULTILINE)
    environment["command"] = re.sub(r"=/\S+", "=PATH", environment.get("command", ""))  # folders of one machine
    row = {key: str(environment.get(key, "")) for key in ABOUT} | {"run": folder.name, "seed": seed[1] if seed else ""}
    results = folder / "results.json"
    scores = json.loads(results.read_text()) if results.exists() else {}
    return row | {name: f"{value:.4f}" for name, value in scores.items()}


def update(csv_path: Path, folders: list[Path]) -> list[dict[str, str]]:
    """Rows of the CSV, with those of `folders` added or replaced; the file is written if anything is new."""
    rows = {row["run"]: row for row in csv.DictReader(csv_path.open(newline=""))} if csv_path.exists() else {}
    rows |= {folder.name: read_run(folder) for folder in folders}
    if folders:
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        with csv_path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows.values())
    return list(rows.values())


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: a line per score and a column per run, or a line per run where a study has columns of its own."""
    scores = [key for key in rows[0] if HEADLINE.search(key)]
    first = rows[0]
    about = f"`{first['command']}` at commit {first['commit']}, torch {first['torch']}, {first['machine']}."
    return "\n".join([*(_by_score(rows, scores) if scores else _by_run(rows)), "", about])


def _by_run(rows: list[dict[str, str]]) -> list[str]:
    columns = [key for key in rows[0] if key not in ABOUT]
    return [_line(columns), _line(["---"] * len(columns)), *(_line([row[key] for key in columns]) for row in rows)]


def _by_score(rows: list[dict[str, str]], scores: list[str]) -> list[str]:
    """With mean ± standard deviation where there are several runs."""
    several = len(rows) > 1
    head = [
        "score",
        *(f"seed {row['seed']}" if several else row["run"] for row in rows),
        *(["mean ± std"] if several else []),
    ]
    lines = [
        _line(head),
        _line(["---"] * len(head)),
        _line(["seconds, all included", *(r["seconds"] for r in rows), *([""] if several else [])]),
    ]
    for score in scores:
        values = [row.get(score) or "" for row in rows]
        numbers = [float(value) for value in values if value]
        spread = (
            [f"{statistics.mean(numbers):.4f} ± {statistics.stdev(numbers):.4f}"]
            if several and len(numbers) > 1
            else [""] * several
        )
        lines.append(_line([f"`{score}`", *values, *spread]))
    return lines


def write_table(readme: Path, name: str, text: str) -> None:
    block = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table -->)", flags=re.DOTALL)
    old = readme.read_text()
    readme.write_text(block.sub(lambda match: f"{match[1]}{text}\n{match[2]}", old))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a folder of experiments/")
    parser.add_argument("runs", nargs="*", type=Path, help="run folders")
    arguments = parser.parse_args()
    folder = EXPERIMENTS / arguments.study
    rows = update(folder / "results.csv", arguments.runs)
    text = table(rows)
    for readme in (folder / "README.md", EXPERIMENTS.parent / "README.md"):
        write_table(readme, arguments.study, text)
    print(text)


if __name__ == "__main__":
    main()

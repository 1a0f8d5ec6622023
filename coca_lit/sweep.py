"""The table at the end of a multirun: what each job changed, and what came of it."""

import csv
import json
import time
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

_started: list[
    tuple[Path, float]
] = []  # folder and time of the sweeps of this process whose table is still to be printed


class RememberSweep(Callback):
    """Hydra skips its own end-of-sweep hook when a job failed, so the folder is noted at the start and the table
    printed when all is over.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _started.append((Path(config.hydra.sweep.dir), time.time()))


def print_sweep() -> None:
    """Prints the table of the sweep that ran in this process, if one did, and writes it down, with a report."""
    from coca_lit.report import write_comparison

    while _started:
        folder, since = _started.pop()
        if rows := read_sweep(folder, since):
            _write_csv(folder / "results.csv", rows)
            _print_table(rows, str(folder))
            if any(row["status"] == "ok" for row in rows):
                print(f"compared in {write_comparison([folder], folder)}")


def read_sweep(folder: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """One row per job that began after `since`, in order of their start: folder, changed keys, status ("ok" or
    "failed") and scores.
    """
    begun = {path.parent.parent: path.stat().st_mtime for path in folder.glob("*/.hydra/overrides.yaml")}
    jobs = sorted((job for job, start in begun.items() if start >= since), key=lambda job: begun[job])
    return [_read_job(job, begun[job]) for job in jobs]


def _read_job(job: Path, begun: float) -> dict[str, Any]:
    overrides = [str(override) for override in OmegaConf.load(job / ".hydra" / "overrides.yaml")]
    results = job / "results.json"
    done = (
        results.exists() and results.stat().st_mtime >= begun
    )  # an older file is from an earlier sweep in this folder
    scores = json.loads(results.read_text()) if done else {}
    return {
        "job": job.name,
        **{key: value for key, _, value in (o.partition("=") for o in overrides)},
        "status": "ok" if done else "failed",
        **scores,
    }


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def _print_table(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    constant = {
        c for c in _columns(rows) if len(rows) > 1 and len({str(row.get(c)) for row in rows}) == 1 and c != "status"
    }
    shown = [
        c
        for c in _columns(rows)
        if c not in constant and not c.endswith(("@5", "@10", "Bleu_1", "Bleu_2", "Bleu_3", "median_rank"))
    ]
    table = Table(*shown, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in (row.get(c, "") for c in shown)))
    Console().print(table)

"""Sweeps, with any launcher and sweeper: records of their jobs, and at the end a table, a page and the best run.

Each job keeps a record in its own folder, written by the process that runs it, on whatever machine. To a sweep belong
all jobs in its folder with the same fixed values and the same varied keys: one that is started again, or goes on with
an Optuna study, shows also what it did before.
"""

import csv
import json
import re
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override

from coca_lit.errors import ConfigError
from coca_lit.metrics import lower_is_better
from coca_lit.report.objective import best_run, headline
from coca_lit.runs.launch import is_first_process, job_folder
from coca_lit.runs.redaction import redact

RECORD, ERROR = "job.json", "error.txt"
IN_ONE_PROCESS = ("JoblibLauncher", "RayLauncher", "RayAWSLauncher", "LocalLauncher")


class Sweep(NamedTuple):
    """A multirun that was started by this process."""

    id: str
    folder: Path
    fixed: dict[str, str]  # overrides that are the same for all jobs
    keys: set[str]  # of all overrides
    left_out: set[str]  # overrides that may differ within a sweep: they say where and how fast
    objective: str | None


_started: list[Sweep] = []  # those whose table is still to be printed


class SweepRecords(Callback):
    """Notes each job's beginning and end in its folder. Hydra takes it along to wherever a job runs."""

    def __init__(self) -> None:
        self.sweep = ""  # id of the sweep; empty outside one

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
        overrides = OverridesParser.create().parse_overrides([*parameters, *config.hydra.overrides.task])
        fixed = [override for override in overrides if not override.is_sweep_override()]
        left_out = set(config.hydra.job.config.override_dirname.exclude_keys) - {
            o.key_or_group for o in overrides if o.is_sweep_override()
        }
        name_folders(config, fixed, left_out)
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)  # before an Optuna study wants to lie in it
        self.sweep = uuid4().hex
        keys, objective = {o.get_key_element() for o in overrides}, OmegaConf.select(config, "objective")
        _started.append(Sweep(self.sweep, folder, _values(map(_text, fixed)), keys, left_out, objective))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self.sweep and is_first_process():
            job = Path(config.hydra.runtime.output_dir)
            (job / ERROR).unlink(missing_ok=True)
            _write_record(job, {"sweep": self.sweep, "begun": time.time(), "status": "unfinished"})

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if self.sweep and is_first_process():
            job = Path(config.hydra.runtime.output_dir)
            record = json.loads((job / ".hydra" / RECORD).read_text())
            if job_return.status is JobStatus.COMPLETED:
                _write_record(job, {**record, "status": "ok"})
                return
            error = job_return._return_value  # the public property raises it
            (job / ERROR).write_text(redact("".join(traceback.format_exception(error))))
            said = [line for line in redact(str(error)).splitlines() if line.strip()]
            _write_record(job, {**record, "status": "failed", "error": said[-1] if said else type(error).__name__})


def name_folders(config: DictConfig, fixed: Sequence[Override], left_out: set[str]) -> None:
    """Names the folder of a sweep after its fixed values, unless it was named, and those of its jobs after the rest.

    Hydra composes each job from the overrides of the command line, on whatever machine, so the names go there.
    """
    named = any(override.startswith("hydra.sweep.dir=") for override in config.hydra.overrides.hydra)
    parts = sorted(_text(o) for o in fixed if o.key_or_group not in left_out)
    with flag_override(config.hydra, ["struct", "readonly"], [False, False]):
        if parts and not named:
            folder = Path(config.hydra.sweep.dir)
            config.hydra.sweep.dir = str(folder.with_name(job_folder(",".join([folder.name, *parts]))))
        config.hydra.overrides.hydra += [
            f"hydra.sweep.dir='{config.hydra.sweep.dir}'",
            f"hydra.job.config.override_dirname.exclude_keys={[o.key_or_group for o in fixed]}",
        ]


def check_direction(objective: str | None) -> None:
    """Raises `ConfigError` if a sweeper that searches, such as Optuna's, would search for the worst runs."""
    direction = HydraConfig.get().sweeper.get("direction")
    wanted = "minimize" if objective is not None and lower_is_better(objective) else "maximize"
    if isinstance(direction, str) and direction != wanted:
        raise ConfigError(f"objective={objective} needs hydra.sweeper.direction={wanted}, got {direction}")


def check_processes(count: int) -> None:
    """Raises `ConfigError` if a job of a sweep wants more processes than its launcher can give it."""
    if count == 1 or not HydraConfig.initialized():
        return
    launcher = HydraConfig.get().launcher.get("_target_", "").rpartition(".")[2]
    if launcher in IN_ONE_PROCESS:
        raise ConfigError(
            f"{launcher} runs each job in one process, and this job wants {count}: say trainer.devices=1 to train "
            "models side by side, hydra/launcher=slurm_jobs for large jobs, or no launcher for one job after another"
        )


def print_sweep() -> None:
    """Prints the table of the sweep that ran in this process, if one did, and writes it down with a page that compares
    its jobs. Exits with an error if none of them succeeded.
    """
    while _started:
        sweep = _started.pop()
        if not is_first_process():
            sys.exit()  # without an error, at which torchrun would end the first process before it has told
        rows = read_sweep(sweep)
        new = [row.pop("new") for row in rows]
        if any(new):
            _write_csv(sweep.folder / "results.csv", rows)
            _print_end(sweep, rows)


def read_sweep(sweep: Sweep) -> list[dict[str, Any]]:
    """One row per job of the sweep, in order of their beginning: folder, overrides, status, scores or what went wrong;
    and whether it is `new`, that is, run by this process.
    """
    found = []
    for path in sweep.folder.glob(f"*/.hydra/{RECORD}"):
        record = json.loads(path.read_text())
        overrides = _values(str(override) for override in OmegaConf.load(path.with_name("overrides.yaml")))
        if _belongs(overrides, sweep):
            found.append((record, overrides, path.parent.parent))
    return [_row(sweep, *job) for job in sorted(found, key=lambda job: job[0]["begun"])]


def _belongs(overrides: dict[str, str], sweep: Sweep) -> bool:
    fixed = {key: value for key, value in sweep.fixed.items() if key not in sweep.left_out}
    return overrides.keys() - sweep.left_out == sweep.keys - sweep.left_out and fixed.items() <= overrides.items()


def _row(sweep: Sweep, record: dict[str, Any], overrides: dict[str, str], job: Path) -> dict[str, Any]:
    status, results = record["status"], job / "results.json"
    scores = json.loads(results.read_text()) if status == "ok" and results.exists() else {}
    outcome = scores if status == "ok" else {"error": record.get("error", "")}
    said = {key: value for key, value in overrides.items() if key not in sweep.left_out}
    return {"job": job.name, **said, "status": status, **outcome, "new": record["sweep"] == sweep.id}


def _print_end(sweep: Sweep, rows: Sequence[dict[str, Any]]) -> None:
    from coca_lit.report.write import write_comparison

    ok = [row for row in rows if row["status"] == "ok"]
    scores = {row["job"]: {name: value for name, value in row.items() if isinstance(value, float)} for row in ok}
    score = sweep.objective or headline(list(dict.fromkeys(name for job in scores.values() for name in job)))
    best = best_run(scores, score) if score else None
    _print_table(rows, str(sweep.folder), score, best)
    if not ok:
        sys.exit(f"error: none of the {len(rows)} jobs succeeded; the first said: {rows[0]['error'] or 'nothing'}")
    if best is not None:
        print(f"best {score}: {scores[best][score or '']:.4f} in {sweep.folder / best}")
    if compared := [sweep.folder / job for job in scores if (sweep.folder / job / "results.json").exists()]:
        print(f"compared in {write_comparison(compared, sweep.folder, score)}")


def _text(override: Override) -> str:
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def _values(overrides: Iterable[str]) -> dict[str, str]:
    return {key: value for key, _, value in (redact(override).partition("=") for override in overrides)}


def _write_record(job: Path, record: dict[str, Any]) -> None:
    (job / ".hydra" / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = dict.fromkeys(key for row in rows for key in row)
    return [*(c for c in columns if c != "error"), *(c for c in columns if c == "error")]


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def _print_table(rows: Sequence[dict[str, Any]], title: str, score: str | None, best: str | None) -> None:
    """Leaves out what is the same for all jobs, and their names if the values that they stand for are there."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    constant = {c for c in _columns(rows) if len(rows) > 1 and len({str(row.get(c)) for row in rows}) == 1}
    minor = ("@5", "@10", "Bleu_1", "Bleu_2", "Bleu_3", "median_rank")
    shown = [
        c for c in _columns(rows) if (c not in constant and not c.endswith(minor)) or c in ("status", score, "error")
    ]
    if shown.index("status") > 1:
        shown.remove("job")
    table = Table(*shown)
    for row in rows:
        style = "bold" if row["job"] == best else None
        table.add_row(*(escape(_cell(row.get(column, ""))) for column in shown), style=style)
    print(title)
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return (
        f"{float(value):.4g}" if re.fullmatch(r"\d+\.\d{5,}(e-?\d+)?", str(value)) else str(value)
    )  # Optuna's numbers

"""Sweeps, with any launcher and sweeper: records of their jobs, and at the end a table, a page and the best run.

The process that runs a job, on any machine, keeps a record in the job's folder. A sweep consists of all jobs in
its folder with the same fixed values and the same varied keys: a sweep that is started again, or that continues an
Optuna study, also shows its earlier jobs.
"""

import csv
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override

from coca_lit.errors import ConfigError
from coca_lit.files import atomic_write
from coca_lit.reading import read_json
from coca_lit.report.scores import best_run, cell, headline, lower_is_better
from coca_lit.runs.launch import is_first_process, job_folder
from coca_lit.runs.redaction import masked_yaml, redact

RECORD, ERROR, SWEEP_VARIABLE = "job.json", "error.txt", "COCA_LIT_SWEEP"
IN_ONE_PROCESS = ("JoblibLauncher", "RayLauncher")


class Sweep(NamedTuple):
    """A multirun that was started by this process."""

    id: str
    folder: Path
    fixed: dict[str, str]  # overrides that are the same for all jobs
    keys: set[str]  # of all overrides
    left_out: set[str]  # overrides that may differ within a sweep: where and how fast it runs
    objective: str | None
    may_fail: bool  # whether the sweeper takes a failed job for a result


_started: list[Sweep] = []  # those whose table is still to be printed


class SweepCallback(Callback):
    """Names the folders of a sweep, and masks the secrets in Hydra's record of it, `multirun.yaml`."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
        overrides = OverridesParser.create().parse_overrides([*parameters, *config.hydra.overrides.task])
        fixed = [override for override in overrides if not override.is_sweep_override()]
        left_out = set(config.hydra.job.config.override_dirname.exclude_keys) - {
            o.key_or_group for o in overrides if o.is_sweep_override()
        }
        sweep = uuid4().hex
        prepare_jobs(config, sweep, fixed, left_out)
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)  # an Optuna study is created in it first
        _started.append(
            Sweep(
                id=sweep,
                folder=folder,
                fixed=_values(map(_text, fixed)),
                keys={_key(o) for o in overrides},
                left_out=left_out,
                objective=OmegaConf.select(config, "scoring.objective"),
                may_fail="max_failure_rate" in config.hydra.sweeper,
            )
        )

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if os.environ.get(SWEEP_VARIABLE):
            mask_multirun(Path(config.hydra.sweep.dir))


def mask_multirun(folder: Path) -> None:
    """Hydra's basic sweeper saves the whole config just before the first job, typed secrets included."""
    path = folder / "multirun.yaml"
    if is_first_process() and path.is_file() and (masked := masked_yaml(OmegaConf.load(path))) != path.read_text():
        path.write_text(masked)


@contextmanager
def job_record() -> Iterator[None]:
    """Records the start and the end of a job in its folder, if it belongs to a sweep; in the process that runs it, on
    whatever machine.
    """
    sweep = os.environ.get(SWEEP_VARIABLE)
    if not sweep or not is_first_process():
        yield
        return
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    record = {"sweep": sweep, "begun": time.time(), "overrides": _values(hydra.overrides.task)}
    (folder / ERROR).unlink(missing_ok=True)
    _write_record(folder, {**record, "status": "unfinished"})
    try:
        yield
    except Exception as error:
        (folder / ERROR).write_text(redact("".join(traceback.format_exception(error))))
        message = [line for line in redact(str(error)).splitlines() if line.strip()]
        _write_record(folder, {**record, "status": "failed", "error": message[-1] if message else type(error).__name__})
        raise
    except SystemExit:  # a signal, with everything saved
        _write_record(folder, {**record, "status": "stopped", "error": "by a signal; the same command resumes it"})
        raise
    _write_record(folder, {**record, "status": "ok"})


def record_death(config: DictConfig, reason: str) -> None:
    """Records as failed a job whose process ended before it could do so itself.

    Args:
        config: of the job, with Hydra's part.
    """
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        folder = Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir
        sweep, overrides = config.hydra.job.env_set[SWEEP_VARIABLE], _values(config.hydra.overrides.task)
    finally:
        HydraConfig.instance().cfg = before
    folder.mkdir(parents=True, exist_ok=True)
    record = read_json(folder / RECORD, dict) if (folder / RECORD).exists() else {}
    if record.get("sweep") != sweep:
        record = {"sweep": sweep, "begun": time.time(), "overrides": overrides, "status": "unfinished"}
    if record["status"] == "unfinished":
        _write_record(folder, {**record, "status": "failed", "error": reason})


def prepare_jobs(config: DictConfig, sweep: str, fixed: Sequence[Override], left_out: set[str]) -> None:
    """Names the folder of a sweep after its fixed values, unless it was named, and the folders of its jobs after the
    rest; and tells every job which sweep it belongs to.

    Hydra composes each job from the overrides of the command line, on whatever machine, so both become overrides.
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
            f"+hydra.job.env_set.{SWEEP_VARIABLE}='{sweep}'",
        ]


def check_direction(objective: str | None) -> None:
    """Raises `ConfigError` if a sweeper that searches, such as Optuna's, would search for the worst runs."""
    direction = HydraConfig.get().sweeper.get("direction")
    wanted = "minimize" if objective is not None and lower_is_better(objective) else "maximize"
    if isinstance(direction, str) and direction != wanted:
        raise ConfigError(f"scoring.objective={objective} needs hydra.sweeper.direction={wanted}, got {direction}")


def check_processes(count: int) -> None:
    """Raises `ConfigError` if a job of a sweep wants more processes than its launcher can give it."""
    if count == 1 or not HydraConfig.initialized():
        return
    launcher = HydraConfig.get().launcher.get("_target_", "").rpartition(".")[2]
    if launcher in IN_ONE_PROCESS:
        raise ConfigError(
            f"{launcher} runs each job in one process, and this job wants {count}: set trainer.devices=1 to train "
            "models side by side, hydra/launcher=slurm_jobs for large jobs, or no launcher for one job after another"
        )


def print_sweep() -> bool:
    """Whether a sweep was started in this process. If so, prints its table, and writes it to a file and to a page that
    compares the jobs. Exits with an error if a job failed that should not have, or if none succeeded.
    """
    if not _started:
        return False
    sweep = _started.pop()
    if not is_first_process():
        sys.exit()  # without an error, at which torchrun would end the first process before it has printed the table
    mask_multirun(sweep.folder)
    rows = read_sweep(sweep)
    new = [row for row in rows if row.pop("new")]
    if new:
        _write_csv(sweep.folder / "results.csv", rows)
        _print_end(sweep, rows)
    failed = [row for row in new if row["status"] == "failed"]
    if failed and not sweep.may_fail:
        sys.exit(f"error: {failed[0]['error']}")
    if stopped := [row for row in new if row["status"] in ("stopped", "unfinished")]:
        sys.exit(f"error: {len(stopped)} of {len(new)} jobs did not end: the same command resumes them")
    return bool(new)


def read_sweep(sweep: Sweep) -> list[dict[str, Any]]:
    """One row per job of the sweep, in the order in which they began: folder, overrides, status, scores or the error;
    and whether it is `new`, that is, run by this process.
    """
    found = []
    for path in sweep.folder.glob(f"*/{RECORD}"):
        record = read_json(path, dict)
        if _belongs(record["overrides"], sweep):
            found.append((record, path.parent))
    return [_row(sweep, *job) for job in sorted(found, key=lambda job: job[0]["begun"])]


def _belongs(overrides: dict[str, str], sweep: Sweep) -> bool:
    fixed = {key: value for key, value in sweep.fixed.items() if key not in sweep.left_out}
    return overrides.keys() - sweep.left_out == sweep.keys - sweep.left_out and fixed.items() <= overrides.items()


def _row(sweep: Sweep, record: dict[str, Any], job: Path) -> dict[str, Any]:
    status, results = record["status"], job / "results.json"
    scores = read_json(results, dict) if status == "ok" and results.exists() else {}
    outcome = scores if status == "ok" else {"error": record.get("error", "")}
    varied = {key: value for key, value in record["overrides"].items() if key not in sweep.left_out}
    return {"job": job.name, **varied, "status": status, **outcome, "new": record["sweep"] == sweep.id}


def _print_end(sweep: Sweep, rows: Sequence[dict[str, Any]]) -> None:
    from coca_lit.report.page import write_comparison
    from coca_lit.report.tables import print_jobs

    ok = [row for row in rows if row["status"] == "ok"]
    scores = {row["job"]: {name: value for name, value in row.items() if isinstance(value, float)} for row in ok}
    score = sweep.objective or headline(list(dict.fromkeys(name for job in scores.values() for name in job)))
    best = best_run(scores, score) if score else None
    print_jobs(rows, str(sweep.folder), score, best)
    if not ok:
        sys.exit(f"error: none of the {len(rows)} jobs succeeded; the first error: {rows[0]['error'] or 'none'}")
    if best is not None:
        print(f"best {score}: {cell(score or '', scores[best][score or ''])} in {sweep.folder / best}")
    if compared := [sweep.folder / job for job in scores if (sweep.folder / job / "results.json").exists()]:
        compared += [sweep.folder / row["job"] for row in rows if row["status"] != "ok"]
        print(f"compared in {write_comparison(compared, sweep.folder, score)}")


def _text(override: Override) -> str:
    return f"{_key(override)}={override.get_value_element_as_str()}"


def _key(override: Override) -> str:
    return override.get_key_element().removeprefix("++")


def _values(overrides: Iterable[str]) -> dict[str, str]:
    return {key.removeprefix("++"): value for key, _, value in (redact(o).partition("=") for o in overrides)}


def _write_record(job: Path, record: dict[str, Any]) -> None:
    atomic_write(job / RECORD, (json.dumps(record, indent=2) + "\n").encode())


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = dict.fromkeys(key for row in rows for key in row)
    return [*(c for c in columns if c != "error"), *(c for c in columns if c == "error")]


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)

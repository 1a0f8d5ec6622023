"""Sweeps, with any launcher and sweeper: records of their jobs, which a report gets at the end.

The process that runs a job, on any machine, keeps a record in the job's folder. A sweep consists of all jobs in
its folder with the same fixed values and the same varied keys: a sweep that is started again, or that continues a
search, also shows its earlier jobs.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_class, get_method
from omegaconf import DictConfig, OmegaConf, flag_override

from coca_lit.errors import ConfigError, suggest
from coca_lit.files import atomic_write, write_json
from coca_lit.machine import is_first_process
from coca_lit.reading import read_json
from coca_lit.runs.launch import job_folder
from coca_lit.runs.redaction import masked_yaml, redact
from coca_lit.runs.scores import headline

if TYPE_CHECKING:
    from coca_lit.evals import Evaluation

RECORD = "job.json"
ERROR = "error.txt"
SWEEP_VARIABLE = "COCA_LIT_SWEEP"


class Sweep(NamedTuple):
    """A multirun that was started by this process."""

    id: str
    folder: Path
    fixed: dict[str, str]  # overrides that are the same for all jobs
    keys: set[str]  # of all overrides
    left_out: set[str]  # overrides that may differ within a sweep: where and how fast it runs
    objective: str | None
    report: str | None  # the function that reports the jobs


_started: list[Sweep] = []  # those whose end is still to be told


class SweepCallback(Callback):
    """Names the folders of a sweep, and masks the secrets in Hydra's record of it, `multirun.yaml`.

    Args:
        report: full name of the function that reports the jobs, called with the folder of the sweep, a row for each job
            (see `read_sweep`) and `scoring.objective`.
    """

    def __init__(self, report: str | None = None) -> None:
        self.report = report

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        objective = OmegaConf.select(config, "scoring.objective")
        given = OverridesParser.create().parse_overrides([*config.hydra.overrides.task])
        params = config.hydra.sweeper.get("params")
        if params:  # keys on the command line replace them
            with flag_override(config.hydra, ["struct", "readonly"], [False, False]):
                named = {_key(override) for override in given}
                kept = {key: value for key, value in params.items() if key.lstrip("+") not in named}
                config.hydra.sweeper.params = kept
                if version("hydra-core") >= "1.4":  # which compares the sweeper of each job with this one
                    values = {key: QuotedString(str(value), Quote.double).with_quotes() for key, value in kept.items()}
                    entries = ", ".join(f"{key}: {value}" for key, value in values.items())
                    of_jobs = ["hydra.sweeper.params=null", f"++hydra.sweeper.params={{{entries}}}"]
                    config.hydra.overrides.hydra += of_jobs
        parameters = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
        overrides = [*OverridesParser.create().parse_overrides(parameters), *given]
        overrides = [*{_key(override): override for override in overrides}.values()]  # the last one of a key counts
        fixed = [override for override in overrides if not override.is_sweep_override()]
        left_out = set(config.hydra.job.config.override_dirname.exclude_keys) - {
            o.key_or_group for o in overrides if o.is_sweep_override()
        }
        if config.hydra.runtime.choices.get("trainer") == "smoke":  # which decides what is trained, too
            left_out.discard("trainer")
        sweep = uuid4().hex
        prepare_jobs(config, sweep, fixed, left_out)
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)  # a sweeper may write there first
        _started.append(
            Sweep(
                id=sweep,
                folder=folder,
                fixed=override_values(map(_text, fixed)),
                keys={_key(o) for o in overrides},
                left_out=left_out,
                objective=objective,
                report=self.report,
            )
        )

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if os.environ.get(SWEEP_VARIABLE):
            mask_multirun(Path(config.hydra.sweep.dir))


def mask_multirun(folder: Path) -> None:
    """Hydra's basic sweeper saves the whole config just before the first job, in each process, typed secrets
    included.
    """
    path = folder / "multirun.yaml"
    if path.is_file() and (masked := masked_yaml(OmegaConf.load(path))) != path.read_text(encoding="utf-8"):
        atomic_write(path, masked.encode())


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
    record = {"sweep": sweep, "begun": time.time(), "overrides": override_values(hydra.overrides.task)}
    (folder / ERROR).unlink(missing_ok=True)
    write_json(folder / RECORD, {**record, "status": "unfinished"})
    try:
        yield
    except Exception as error:
        said = redact("".join(traceback.format_exception(error)))
        (folder / ERROR).write_text(said, encoding="utf-8", errors="backslashreplace")
        message = [line for line in redact(str(error)).splitlines() if line.strip()]
        write_json(
            folder / RECORD, {**record, "status": "failed", "error": message[-1] if message else type(error).__name__}
        )
        raise
    except SystemExit:  # a signal, with everything saved
        reason = "stopped by a signal; the same command resumes it"
        write_json(folder / RECORD, {**record, "status": "stopped", "error": reason})
        raise
    write_json(folder / RECORD, {**record, "status": "ok"})


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


def sweep_score(results: Any, cfg: DictConfig) -> Any:
    """The number that a sweeper asks for: of the scores of a run the one called `scoring.objective`, or the first
    headline score.

    Raises:
        ConfigError: there is no such score.
    """
    if not isinstance(results, dict):
        return results
    score = OmegaConf.select(cfg, "scoring.objective") or headline(results)
    if results and score is not None and score not in results:
        raise ConfigError(
            f"scoring.objective: there is no score '{score}'{suggest(score, results)} Scores: {', '.join(results)}"
        )
    return results.get(score)


def check_search(evals: Sequence["Evaluation"]) -> None:
    """Raises `ConfigError` if a sweeper searches, and nothing says by which score of these evaluations."""
    if not HydraConfig.initialized() or not _searches():
        return
    names = [f"{e.name}/{score}" for e in evals for score in (*e.score_names, *(e.final_score_names or ()))]
    known = all(e.score_names and e.final_score_names is not None for e in evals)  # not of one's own
    if known and headline(names) is None:
        raise ConfigError(f"scoring.objective: name the score that the search improves, one of: {', '.join(names)}")


def _searches() -> bool:
    """Whether the sweeper chooses the values of this job by the scores of others."""
    hydra = HydraConfig.get()
    return hydra.mode == RunMode.MULTIRUN and isinstance(hydra.sweeper.get("direction"), str)


def check_processes(count: int) -> None:
    """Raises `ConfigError` if a job of a sweep wants more processes than its launcher gives it. The class of a launcher
    that starts one process for each job has a true attribute `one_process_per_job`.
    """
    if count == 1 or not HydraConfig.initialized():
        return
    launcher = get_class(HydraConfig.get().launcher._target_)
    if _searches() and launcher.__name__ == "BasicLauncher":
        raise ConfigError(
            f"each of {count} processes would ask the search for values of its own: set trainer.devices=1, or choose a "
            "hydra/launcher that starts the processes of a job"
        )
    if getattr(launcher, "one_process_per_job", False):
        raise ConfigError(
            f"{launcher.__name__} runs each job in one process, and this job wants {count}: set trainer.devices=1 to "
            "train models side by side, or choose no launcher for one job after another"
        )


def end_sweep() -> bool:
    """Reports the sweep that was started in this process, and returns whether there was one. Exits with an error if a
    job failed or did not end, whatever the sweeper: a scheduler sees it, and all others have run to their end.
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
        if sweep.report is not None:
            get_method(sweep.report)(sweep.folder, rows, sweep.objective)
        if all(row["status"] != "ok" for row in rows):
            reasons = [row["error"] for row in rows if row["error"]]
            reason = next(iter(reasons), "they did not end; the same command resumes them")
            sys.exit(f"error: none of the {len(rows)} jobs succeeded: {reason}")
    failed = [row for row in new if row["status"] == "failed"]
    if failed:
        sys.exit(f"error: {failed[0]['error']}")
    stopped = [row for row in new if row["status"] in ("stopped", "unfinished")]
    if stopped:
        sys.exit(f"error: {len(stopped)} of {len(new)} jobs did not end: the same command resumes them")
    return bool(new)


def read_sweep(sweep: Sweep) -> list[dict[str, Any]]:
    """One row per job of the sweep, in the order in which they began: folder, overrides, status, scores or the error;
    and whether it is `new`, that is, run by this process.
    """
    found = []
    fixed = {key: value for key, value in sweep.fixed.items() if key not in sweep.left_out}
    for path in sweep.folder.glob(f"*/{RECORD}"):
        record = read_json(path, dict)
        overrides = record["overrides"]
        if overrides.keys() - sweep.left_out == sweep.keys - sweep.left_out and fixed.items() <= overrides.items():
            found.append((record, path.parent))
    rows = []
    for record, job in sorted(found, key=lambda job: job[0]["begun"]):
        status = record["status"]
        results = job / "results.json"
        scores = read_json(results, dict) if status == "ok" and results.exists() else {}
        outcome = scores if status == "ok" else {"error": record.get("error", "")}
        varied = {key: value for key, value in record["overrides"].items() if key not in sweep.left_out}
        rows.append({"job": job.name, **varied, "status": status, **outcome, "new": record["sweep"] == sweep.id})
    return rows


def _text(override: Override) -> str:
    return f"{_key(override)}={override.get_value_element_as_str()}"


def _key(override: Override) -> str:
    return override.get_key_element().removeprefix("++")


def override_values(overrides: Iterable[str]) -> dict[str, str]:
    return {key.removeprefix("++"): value for key, _, value in (redact(o).partition("=") for o in overrides)}

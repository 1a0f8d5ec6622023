"""Reads run folders for a report. A folder may be a stranger's: its files are bounded data, and what is not as a run
writes it is named in one sentence.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from coca_lit.cli.schema import leaves
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.metrics.uncertainty import Conditions, Draws
from coca_lit.reading import printable, read_run_file, read_run_json, read_run_yaml
from coca_lit.runs.results import read_conditions, read_draws
from coca_lit.runs.run_folder import ARCHIVED
from coca_lit.runs.scores import cell, interval_cell
from coca_lit.tools.report import comparable
from coca_lit.tools.report.comparable import obstacle

Points = list[tuple[int, float]]  # step and value
Curves = dict[str, Points]  # by name
BOOKKEEPING = ("name", "output_dir", "evals.", "report.")  # keys that differ between equal runs
EVALUATED = "checkpoint"  # the key that names the model of an evaluation, which only evaluations have
RESULTS, JOB = "results.json", "job.json"  # of a finished run; of a job of a sweep, see `coca_lit.cli.sweep`
MAX_CURVES, MAX_SHEET = 2**28, 2**25  # bytes of metrics.csv and of a sheet of samples
Number = int | float
_CAPTIONS = [{"image": str, "question?": str, "caption": str, "exact": bool, "references": [str]}]
_IMAGES = [{"text": str, "answers": [{"image": str, "hit": bool}]}]
_TEXTS = [{"image": str, "answers": [{"text": str, "hit": bool}]}]
SAMPLES: dict[str, Any] = {  # NAME_KIND.json of `coca_lit.evals.samples`: kind -> shape; a key with ? may be missing
    "captions": _CAPTIONS,
    "worst": _CAPTIONS,
    "retrieval": {
        "text_to_image": _IMAGES,
        "image_to_text": _TEXTS,
        "text_to_image_mistakes?": _IMAGES,
        "image_to_text_mistakes?": _TEXTS,
    },
    "attention": [{"image": str, "words": [{"map": str, "word": str}]}],
    "confusion": [{"image": str, "class": str, "taken_for": str, "images": Number, "of": Number}],
}
ENVIRONMENT = {
    **{"command?": str, "experiment?": str, "seconds?": Number},
    **{"parameters?": {str: Number}, "gflops?": Number, "samples?": Number},
}


class Run(NamedTuple):
    """A finished training run or evaluation."""

    folder: Path
    name: str
    results: dict[str, float]
    not_run: dict[str, str]  # score -> why it is missing
    config: dict[str, Any]  # flat: "model.optimizer.lr" -> value; a reference as it stands: "${seed}"
    environment: dict[str, Any]  # command, commit, machine, versions, seconds
    curves: Curves
    samples: dict[str, dict[str, Any]]  # kind, as in `SAMPLES` -> data set -> content
    sheets: dict[str, bytes]  # name -> PNG
    draws: dict[str, Draws]  # score -> its values for resampled images
    conditions: dict[str, Conditions]  # score -> what it depends on besides the model

    def images(self, score: str) -> int | None:
        """On how many images a score was computed; None if that is unknown."""
        return self.conditions[score].images if score in self.conditions else None

    def cell(self, score: str) -> str:
        """The score as papers print it; empty if the run lacks it."""
        return cell(score, self.results.get(score), self.images(score))

    def interval(self, score: str) -> str:
        """Its interval in the same form; empty if there is none."""
        return interval_cell(score, self.draws[score].interval(), self.images(score)) if score in self.draws else ""


def read_run(folder: Path) -> Run:
    """Reads a finished run.

    Raises:
        DataError: the folder has no results, or a file in it is not as a run writes it.
    """
    if not (folder / RESULTS).is_file():
        raise DataError(f"{folder} holds no {RESULTS}: give the folder of a finished run, or of a sweep with one")
    environment = _read(folder, "environment.json", ENVIRONMENT)
    config = read_run_yaml(folder, "config.yaml")
    return Run(
        folder=folder,
        name=Path(os.path.abspath(folder)).name,
        results={score: float(value) for score, value in _read(folder, RESULTS, {str: Number}).items()},
        not_run=_read(folder, "not_run.json", {str: str}),
        config=flatten(config),
        environment=environment,
        curves=read_curves(folder),
        samples={
            kind: {
                path.name.removesuffix(f"_{kind}.json"): _read(folder, f"samples/{path.name}", shape)
                for path in _evaluated(folder, f"*_{kind}.json")
            }
            for kind, shape in SAMPLES.items()
        },
        sheets={p.stem: read_run_file(folder, f"samples/{p.name}", MAX_SHEET) for p in _evaluated(folder, "*.png")},
        draws=read_draws(folder),
        conditions=read_conditions(folder),
    )


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], dict[str, str]]:
    """The finished runs in the given folders, and the failed jobs, {name: reason}. A folder without results, such as
    that of a sweep, is replaced by the runs and jobs inside it. Where two folders have one name, as jobs of two sweeps
    do, all names begin with the folder above.

    Raises:
        DataError: a folder has neither, or no run is finished.
    """

    def is_run(folder: Path) -> bool:
        return (folder / RESULTS).is_file() or (folder / JOB).is_file()

    places: list[Path] = []
    for folder in folders:
        inside = [] if is_run(folder) else sorted(filter(is_run, folder.glob("*")))
        places += [place for place in inside if not ARCHIVED.fullmatch(place.name)] or [folder]
    runs: list[Run] = []
    failed: dict[str, str] = {}
    parts = [place.absolute().parts for place in places]
    depth = 1
    while len({own[-depth:] for own in parts}) < len(set(parts)):
        depth += 1
    for place, own in zip(places, parts, strict=True):
        name = "/".join(own[-depth:])
        job = _read(place, JOB, {"status?": str, "error?": str})
        status = job.get("status", "ok")
        if status == "ok" and job and not (place / RESULTS).is_file():
            failed[name] = "it goes on after its sweep and has not ended"
        elif status == "ok":
            runs.append(read_run(place)._replace(name=name))
        else:
            failed[name] = job.get("error") or status
    if failed and not runs:
        name, reason = next(iter(failed.items()))
        raise DataError(f"no run is finished; {name}: {reason}")
    return runs, failed


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Config keys in which the runs differ, with the value of each run as its config has it; None where it lists none.
    Neither keys that differ between equal runs, nor, beside an evaluation, those that only trainings have.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config)
    own = [key for key in keys if not key.startswith(BOOKKEEPING) and not key.endswith("_")]  # _target_, _partial_
    if len({EVALUATED in run.config for run in runs}) > 1:
        own = [key for key in own if all(key in run.config for run in runs)]
    rows = {key: [run.config.get(key) for run in runs] for key in own}
    return {key: values for key, values in rows.items() if len(set(map(repr, values))) > 1}


def obstacles(runs: Sequence[Run], score: str) -> list[str]:
    """Of each run, why its score cannot be compared with that of the first run that has it; empty if it can."""
    first = next((run for run in runs if score in run.results), None)
    return [
        obstacle(first.conditions.get(score), run.conditions.get(score))
        if first is not None and run is not first and score in run.results
        else ""
        for run in runs
    ]


def same_data(runs: Sequence[Run], score: str) -> bool:
    """Whether all runs that have the score are known to have it on the same images and texts."""
    return comparable.same_data(run.conditions.get(score) for run in runs if score in run.results)


def flatten(node: Any) -> dict[str, Any]:
    """{"a": {"b": 1, "c": {}}} -> {"a.b": 1}"""
    return {key: value for key, value in leaves(node) if value != {}}


def read_curves(folder: Path) -> Curves:
    """The columns of the CSV logger's file over its column `step`, without an incomplete last line; empty if there is
    no such file.
    """
    try:
        content = read_run_file(folder, "metrics.csv", MAX_CURVES)
    except DataNotFoundError:
        return {}
    curves: Curves = {}
    lines = content[: content.rfind(b"\n") + 1].decode(errors="replace").splitlines()
    try:
        for row in csv.DictReader(lines):
            if not row.get("step"):  # Lightning also logs values that belong to no step
                continue
            step = int(row["step"])
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((step, float(value)))
    except (ValueError, TypeError, OverflowError, csv.Error) as error:
        path = printable(str(folder / "metrics.csv"))
        raise DataError(f"{path} does not hold numbers over steps: {printable(str(error)):.99}") from error
    return curves


def _evaluated(folder: Path, pattern: str) -> list[Path]:
    """Files in samples/, in the order of evaluation."""
    return sorted((folder / "samples").glob(pattern), key=lambda path: path.lstat().st_mtime)


def _read(folder: Path, name: str, shape: Any) -> Any:
    """A JSON file of a run, of this shape; empty if there is none."""
    content = read_run_json(folder, name, type(shape))
    if content and not _fits(content, shape):
        raise DataError(f"{printable(str(folder / name))} does not hold what a run writes there: remove it")
    return content


def _fits(value: Any, shape: Any) -> bool:
    """Whether a value from JSON has a shape: a type, [shape of each], {str: shape of each} or {key: shape}."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(child, shape[0]) for child in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
    if not isinstance(value, dict):
        return False
    if str in shape:
        return all(_fits(child, shape[str]) for child in value.values())
    keys = [(key.removesuffix("?"), key.endswith("?"), child) for key, child in shape.items()]
    return all(_fits(value[key], child) if key in value else optional for key, optional, child in keys)

"""Reads run folders for a report."""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from coca_lit.errors import DataError
from coca_lit.files import whole_lines
from coca_lit.metrics.uncertainty import Draws
from coca_lit.reading import read_json
from coca_lit.runs.draws import read_draws

Curves = dict[str, list[tuple[int, float]]]  # name -> (step, value)
BOOKKEEPING = ("name", "output_dir", "evals.")  # keys that differ between equal runs
JOB_RECORDS = ("job.json", ".hydra/job.json")  # of a job of a sweep, see `coca_lit.cli.sweep`; now, and earlier


class Run(NamedTuple):
    """A finished training run or evaluation."""

    folder: Path
    name: str
    results: dict[str, float]
    not_run: dict[str, str]  # score -> why it is missing
    config: dict[str, Any]  # flat: "model.optimizer.lr" -> value
    unresolved: dict[str, Any]  # the same as the file has it, "${seed}" for a reference
    environment: dict[str, Any]  # command, commit, machine, versions, seconds
    curves: Curves
    captions: dict[str, list[dict[str, Any]]]  # data set -> `caption_samples`
    worst: dict[str, list[dict[str, Any]]]  # data set -> `worst_captions`
    retrieval: dict[str, dict[str, list[dict[str, Any]]]]  # data set -> `retrieval_samples`
    attention: dict[str, list[dict[str, Any]]]  # data set -> `attention_samples`
    confusion: dict[str, list[dict[str, Any]]]  # data set -> `confusion_samples`
    draws: dict[str, Draws]  # score -> its values for resampled images


def read_run(folder: Path) -> Run:
    """Reads a finished run.

    Raises:
        DataError: the folder has no results.
    """
    if not (folder / "results.json").is_file():
        raise DataError(
            f"{folder} holds no results.json: it is not the folder of a finished run, or of a sweep with one"
        )
    config = yaml.safe_load((folder / "config.yaml").read_text()) if (folder / "config.yaml").is_file() else {}
    flat = flatten(config)
    return Run(
        folder=folder,
        name=folder.name,
        results=_scores(folder / "results.json"),
        not_run=_json(folder / "not_run.json"),
        config=resolved(flat),
        unresolved=flat,
        environment=_json(folder / "environment.json"),
        curves=read_curves(folder / "metrics.csv"),
        captions=_samples(folder, "_captions.json"),
        worst=_samples(folder, "_worst.json"),
        retrieval=_samples(folder, "_retrieval.json"),
        attention=_samples(folder, "_attention.json"),
        confusion=_samples(folder, "_confusion.json"),
        draws=read_draws(folder),
    )


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], dict[str, str]]:
    """The finished runs in the given folders, and the failed jobs, {name: reason}. A folder without results, such as
    that of a sweep, is replaced by the runs and jobs inside it. Where two folders have one name, as jobs of two sweeps
    do, all names begin with the folder above.

    Raises:
        DataError: a folder has neither, or no run is finished.
    """
    places: list[Path] = []
    for folder in folders:
        endings = ("results.json", *JOB_RECORDS)
        inside = sorted({path for path in folder.glob("*") if any((path / ending).is_file() for ending in endings)})
        alone = any((folder / ending).is_file() for ending in endings) or not inside
        places += [folder] if alone else inside
    runs: list[Run] = []
    failed: dict[str, str] = {}
    for place, name in zip(places, _names(places), strict=True):
        records = (_json(place / file) for file in JOB_RECORDS if (place / file).is_file())
        record: dict[str, Any] = next(records, {})
        if record.get("status", "ok") == "ok":
            runs.append(read_run(place)._replace(name=name))
        else:
            failed[name] = record.get("error") or record["status"]
    if failed and not runs:
        name, reason = next(iter(failed.items()))
        raise DataError(f"no run is finished; {name}: {reason}")
    return runs, failed


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [place.absolute().parts for place in places]
    depth = 1
    while len({own[-depth:] for own in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(own[-depth:]) for own in parts]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Config keys in which the runs differ, with the value of each run. A key that refers to another one in all runs,
    as `data.seed` does with "${seed}", is no difference of its own.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config if not key.startswith(BOOKKEEPING))
    differ = [key for key in keys if _several(run.unresolved.get(key) for run in runs)]
    values = {key: [run.config.get(key) for run in runs] for key in differ}
    return {key: row for key, row in values.items() if _several(row)}


def _several(values: Iterable[Any]) -> bool:
    return len({repr(value) for value in values}) > 1


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    if not isinstance(node, dict):
        return {prefix: node}
    parts = (flatten(child, f"{prefix}.{key}" if prefix else str(key)) for key, child in node.items())
    return {key: value for part in parts for key, value in part.items()}


def resolved(flat: dict[str, Any]) -> dict[str, Any]:
    """The flat config with references to other keys replaced by their values: "${image_size}" -> 224.

    Nothing else of `${…}` is resolved: a config file is data here, and an environment variable may be a secret.
    """

    def value(text: Any, depth: int = 0) -> Any:
        if not isinstance(text, str) or depth == len(flat):
            return text
        if (whole := _REFERENCE.fullmatch(text)) and _known(whole, flat):
            return value(flat[whole[1]], depth + 1)
        return _REFERENCE.sub(lambda r: str(value(flat[r[1]], depth + 1)) if _known(r, flat) else r[0], text)

    return {key: value(text) for key, text in flat.items()}


_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def _known(reference: re.Match[str], flat: Mapping[str, Any]) -> bool:
    return reference[1] in flat and not reference[1].startswith(BOOKKEEPING)  # those differ between equal runs


def read_curves(metrics: Path) -> Curves:
    """The columns of the CSV logger's file over its column `step`; empty if there is no such file."""
    curves: Curves = {}
    for row in csv.DictReader(whole_lines(metrics)):
        if row["step"]:  # Lightning also logs values that belong to no step
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((int(row["step"]), float(value)))
    return curves


def _samples(folder: Path, ending: str) -> dict[str, Any]:
    """The content of the files with one ending, by data set, in the order of evaluation."""
    paths = sorted((folder / "samples").glob(f"*{ending}"), key=lambda path: path.stat().st_mtime)
    return {path.name.removesuffix(ending): read_json(path) for path in paths}


def _scores(path: Path) -> dict[str, float]:
    scores = _json(path)
    if wrong := [name for name, value in scores.items() if type(value) not in (int, float)]:
        raise DataError(f"{path} holds no number as the score {wrong[0]!r}: evaluate the run again")
    return scores


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, dict) if path.is_file() else {}

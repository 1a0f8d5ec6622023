"""Folders of runs, and what `coca-evaluate` takes from them."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from coca_lit.cli.assembly import plain
from coca_lit.cli.command import compose
from coca_lit.cli.evaluate import with_evals


def run_folder(place: Path, config: dict[str, Any]) -> str:
    """Writes a config into a folder; the word that names it."""
    place.mkdir(exist_ok=True)
    OmegaConf.save(OmegaConf.create(config), place / "config.yaml")
    return f"checkpoint={place}"


def check_evaluations_follow(folder: Path, data: str, key: str, value: str) -> None:
    """Those of a run, as it is written, read their records with the argument that the training data had."""
    word = run_folder(folder, plain(compose("train", [f"data={data}", f"++data.records.{key}={value}"])))
    evals = compose("evaluate", with_evals([word])).evals
    assert evals
    for node in evals.values():
        assert node.records[key] == value

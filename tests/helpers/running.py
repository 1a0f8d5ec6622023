"""Runs for the tests: composed as the command line does it but inside the test process, or as a real command."""

import csv
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as L
import pytest
from omegaconf import DictConfig

from coca_lit.cli import command
from coca_lit.cli import train as cli
from coca_lit.distributed import rank, world_size
from coca_lit.evals import captions
from coca_lit.metrics.captions import CaptionMetric
from coca_lit.tools.report import page
from helpers.forking import Program

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = (ROOT / "conf", *sorted(ROOT.glob("coca_lit/projects/*/conf")))  # folders of config groups
# Any experiment as a check of two steps with the smallest network; scenes are what the exported data sets hold.
TINY = (
    *("trainer=smoke", "model.net.name=coca_tiny", "image_size=32", "scoring.images=8"),
    *("++model.net.text_layers=1", "++model.net.decoder_layers=1"),
)


def compose(*overrides: str) -> DictConfig:
    """The config of `python train.py *overrides`."""
    return command.compose("train", overrides)


def run(folder: Path, *overrides: str, curves: bool = False) -> dict[str, float]:
    """What `python train.py *overrides` does in the run folder `folder`; returns the final scores. To draw the curves
    takes a fifth of a short run.
    """
    with nullcontext() if curves else mock.patch.object(page, "curves_figures", return_value={}):
        return cli.run(compose(f"output_dir={folder}", "name=test", *overrides))


@contextmanager
def watched(*callbacks: L.Callback) -> Iterator[None]:
    """Trainers that are built within the block have these callbacks too, as the last ones."""
    build = cli.build_trainer

    def with_callbacks(*args: Any) -> L.Trainer:
        trainer = build(*args)
        trainer.callbacks += callbacks
        return trainer

    cli.build_trainer = with_callbacks
    try:
        yield
    finally:
        cli.build_trainer = build


@contextmanager
def launched() -> Iterator[None]:
    """What torchrun tells a process of the group that the tests have opened."""
    told = {"RANK": rank(), "LOCAL_RANK": rank(), "GROUP_RANK": 0} | dict.fromkeys(
        ("WORLD_SIZE", "LOCAL_WORLD_SIZE"), world_size()
    )
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "tests"}
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in told.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def train_py(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python train.py *arguments` as a process of its own; relative paths, outputs/ among them, lie in `cwd`."""
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "COV_"))}
    program = Program(str(ROOT / "train.py"), *arguments, cwd=cwd, environment=inherited | paths | environment)
    return program.wait()


def without_java(patch: pytest.MonkeyPatch) -> None:
    """Scores without METEOR, SPICE and the PTB tokenizer, which are Java: a run takes no longer than its model."""
    quick = partial(CaptionMetric, metrics=("Bleu", "ROUGE_L", "CIDEr"), tokenize=_lower)
    patch.setattr(captions, "CaptionMetric", quick)
    patch.setattr(captions, "warm_up", lambda: None)
    patch.delenv("COCA_SPICE_JARS", raising=False)


def _lower(texts: Sequence[str]) -> list[str]:
    return [text.lower() for text in texts]


def logged(folder: Path, ending: str = "") -> dict[str, list[float]]:
    """The columns of metrics.csv, without their gaps."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0] if name.endswith(ending)}


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())

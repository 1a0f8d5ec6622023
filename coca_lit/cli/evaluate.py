"""Scores of a checkpoint: `coca-evaluate checkpoint=PATH evals=[mscoco_captions,mscoco_retrieval]`.

Training shares the evaluations (`conf/evals`). Under torchrun the images are split over the processes; the scores are
the same.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from coca_lit.cli.assembly import build_evals, build_settings
from coca_lit.cli.command import command
from coca_lit.cli.runtime import chosen_dtype, configure_libraries, finish_run, worker_errors
from coca_lit.errors import error_context
from coca_lit.runs.lock import in_use

if TYPE_CHECKING:
    from coca_lit.metrics.uncertainty import Draws
    from coca_lit.models import DualEncoder


def evaluate() -> None:
    """Entry point of `coca-evaluate` and `python -m coca_lit.cli.evaluate`."""
    command("evaluate", run, multirun=True)


def run(cfg: DictConfig) -> dict[str, float]:
    """Scores as configured and returns the scores; the run folder is `cfg.output_dir`."""
    with in_use(Path(cfg.output_dir)), worker_errors():
        return _run(cfg)


def _run(cfg: DictConfig) -> dict[str, float]:
    from coca_lit.distributed import process_group, rank
    from coca_lit.metrics.java.spice import JARS_VARIABLE
    from coca_lit.models import part_sizes
    from coca_lit.runs.run_folder import start_run_folder

    configure_libraries(cfg.threads)
    if cfg.spice_jars is not None:
        os.environ[JARS_VARIABLE] = cfg.spice_jars
    with process_group() as device:
        model = _load(cfg).to(device, chosen_dtype(cfg.precision))
        start_run_folder(cfg)
        settings = build_settings(cfg)
        evals, not_run = build_evals(cfg)
        results: dict[str, float] = {}
        draws: dict[str, Draws] = {}
        for evaluation in evals:
            results |= evaluation.evaluate(model, settings)
            not_run |= evaluation.not_run
            draws |= evaluation.draws
        if rank() == 0:
            finish_run(Path(cfg.output_dir), results, not_run, draws, {"parameters": part_sizes(model)})
    return results


def _load(cfg: DictConfig) -> "DualEncoder":
    from coca_lit.weights.interpolation import interpolate
    from coca_lit.weights.load import load_dual_encoder

    with error_context("checkpoint"):
        model = load_dual_encoder(cfg.checkpoint, cfg.quick_gelu)
    if cfg.interpolate_with is not None:
        with error_context("interpolate_with"):
            interpolate(model, load_dual_encoder(cfg.interpolate_with, cfg.quick_gelu), cfg.weight)
    if cfg.image_size is not None:
        with error_context("image_size"):
            model.set_image_size(cfg.image_size)
    cfg.image_size = model.image_size
    return model


if __name__ == "__main__":
    evaluate()

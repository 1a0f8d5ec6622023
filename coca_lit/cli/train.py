"""Training from the command line: `python train.py` and `coca-train`.

Heavy packages are imported inside functions, so that `--help` and most typing errors are answered at once.
"""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from coca_lit.cli.assembly import (
    argument_defaults,
    build_data,
    build_evals,
    build_module,
    build_scoring,
    build_trainer,
    plain,
    with_vocabulary,
)
from coca_lit.cli.command import command
from coca_lit.cli.runtime import configure_libraries, finish_run, worker_errors
from coca_lit.cli.sweep import SWEEP_VARIABLE, check_direction, check_processes
from coca_lit.errors import ConfigError, error_context, suggest
from coca_lit.report.scores import headline
from coca_lit.runs.launch import is_first_process, launched_processes
from coca_lit.runs.lock import in_use

if TYPE_CHECKING:
    import lightning.pytorch as L


def train() -> None:
    """Entry point of `python train.py` and `coca-train`."""
    command("train", train_job, multirun=True)


def train_job(cfg: DictConfig) -> float | None:
    """`run` for Hydra, whose sweepers ask for one number: the score called `scoring.objective`."""
    objective = cfg.scoring.objective
    check_direction(objective)
    results = run(cfg)
    score = objective or headline(results)
    if results and score is not None and score not in results:
        raise ConfigError(
            f"scoring.objective: there is no score '{score}'{suggest(score, results)} Scores: {', '.join(results)}"
        )
    return results[score] if results and score is not None else None


def run(cfg: DictConfig) -> dict[str, float]:
    """Trains as configured, scores the result and returns the scores; the run folder is `cfg.output_dir`."""
    with in_use(Path(cfg.output_dir)):
        if is_first_process():
            print(f"training {cfg.name}, loading libraries …", flush=True)
        return _run(cfg)


def _run(cfg: DictConfig) -> dict[str, float]:
    import lightning.pytorch as L

    from coca_lit.callbacks import samples_seen
    from coca_lit.models import part_sizes
    from coca_lit.report.tables import print_scores
    from coca_lit.runs.draws import read_draws
    from coca_lit.runs.run_folder import finished_results, resume_command, start_run_folder

    configure_libraries(cfg.threads, cfg.kernels.enabled, tf32=True)
    with error_context("seed"):
        L.seed_everything(cfg.seed, workers=True, verbose=False)
    checkpoint = find_start(cfg)
    if checkpoint is not None and (results := finished_results(cfg, checkpoint)) is not None:
        if is_first_process():
            print_scores(results, read_draws(Path(cfg.output_dir)))
        return results
    module = build_module(with_vocabulary(cfg), checkpoint)
    data = build_data(cfg, module.net.tokenizer)  # before the evaluations: missing training data are reported first
    evals, not_run = build_evals(cfg)
    has_texts = getattr(data, "texts", None) is not None  # a user's DataModule may know nothing of texts
    if has_texts and module.net.decoder is None:
        raise ConfigError("data.text: texts without images train the decoder, which a CLIP (decoder_layers=0) lacks")
    scoring = build_scoring(cfg, evals)
    if cfg.scoring.objective is not None:
        scoring.check_final_score("scoring.objective", cfg.scoring.objective)
    trainer = build_trainer(cfg, scoring, has_texts, checkpoint)
    check_trainer(cfg, trainer)
    if checkpoint is None:
        choose_fp32_matmul(cfg, trainer, module)
    # Not before: a run that cannot start leaves nothing behind.
    start_run_folder(cfg, checkpoint, **chosen_experiment())
    try:
        with worker_errors():
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # stopped by a signal, with everything saved
        if trainer.is_global_zero and not os.environ.get(SWEEP_VARIABLE):  # else it is the command of the sweep
            print(f"resume with: {resume_command(cfg.name)}", flush=True)
        raise
    facts = {**samples_seen(trainer), "parameters": part_sizes(module.net)}
    if trainer.is_global_zero:
        finish_run(Path(cfg.output_dir), scoring.results, not_run | scoring.not_run, scoring.draws, facts)
        if (Path(cfg.output_dir) / "checkpoints" / "last.ckpt").exists():
            use = "coca-caption photos/" if module.net.decoder is not None else "coca-search photos/ TEXT"
            place = shlex.quote(cfg.output_dir)
            print(f"next: {use} checkpoint={place}   or   coca-evaluate checkpoint={place}", flush=True)
    return scoring.results


def chosen_experiment() -> dict[str, str]:
    """The name of the experiment, for reports; nothing where Hydra does not run, as in a test."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return {"experiment": choices["experiment"]} if choices.get("experiment") else {}


def find_start(cfg: DictConfig) -> Path | None:
    """The checkpoint to resume from, or None for a new start. The first process checks that it fits this config."""
    from coca_lit.runs.resume import AUTO, check_same_run, find_checkpoint, resume_keys

    checkpoint = find_checkpoint(Path(cfg.output_dir), cfg.ckpt_path, is_first_process())
    if checkpoint is not None and is_first_process():
        config = resume_keys(plain(cfg))
        check_same_run(checkpoint, config, cfg.ckpt_path == AUTO, argument_defaults(config))
    return checkpoint


def check_trainer(cfg: DictConfig, trainer: "L.Trainer") -> None:
    """Raises `ConfigError` if the run cannot be split over this many processes."""
    from coca_lit.training.sharding import check_batch_size

    check_processes(trainer.world_size)
    planned = trainer.num_devices * trainer.num_nodes  # under DDP, `world_size` is that of the launcher
    if (launched := launched_processes()) > planned:
        raise ConfigError(
            f"{launched} processes were started, but this configuration trains with {planned} "
            f"(trainer.devices={cfg.trainer.devices}): start as many, or do not set trainer.devices"
        )
    if "batch_size" in cfg.data:
        with error_context("data.batch_size"):
            check_batch_size(cfg.data.batch_size, trainer.world_size, cfg.trainer.micro_batch_size)


def choose_fp32_matmul(cfg: DictConfig, trainer: "L.Trainer", module: "L.LightningModule") -> None:
    """Sets the library for fp32 matrix products on a CPU. A resumed run keeps the library that it had."""
    from coca_lit.distributed import print_rank_zero
    from coca_lit.models import kernels

    fp32_on_cpu = trainer.strategy.root_device.type == "cpu" and trainer.precision == "32-true"
    if fp32_on_cpu or cfg.kernels.fp32_matmul != "auto":
        with error_context("kernels"):
            chosen = kernels.use_fp32_matmul(cfg.kernels.fp32_matmul, sum(p.numel() for p in module.parameters()))
        print_rank_zero(f"fp32_matmul: {chosen}")

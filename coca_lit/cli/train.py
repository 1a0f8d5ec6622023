"""Training from the command line: `python train.py` and `coca-train`.

Heavy packages are imported inside functions, so that `--help` is answered at once.
"""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from coca_lit.cli.assembly import build, build_data, build_evals, build_scoring, build_trainer, plain
from coca_lit.cli.command import is_shipped
from coca_lit.cli.module import build_module, load_source, with_recipe, with_start
from coca_lit.cli.runtime import configure_libraries
from coca_lit.cli.schema import argument_defaults
from coca_lit.cli.sweep import SWEEP_VARIABLE, check_processes, check_study
from coca_lit.errors import DataError, error_context
from coca_lit.machine import in_shell, is_first_process
from coca_lit.runs.run_folder import NEWEST, in_use, start_run_folder

OWN_PHOTOS = "coca_lit.data.datasets.folder.folder_records"  # what reads them

if TYPE_CHECKING:
    from coca_lit.data.datamodule import CaptionDataModule
    from coca_lit.models import CoCa
    from coca_lit.runs.resume import Start


def run(cfg: DictConfig) -> dict[str, float]:
    """Trains as configured, scores the result and returns the scores; the run folder is `cfg.output_dir`."""
    cfg, folder = with_start(cfg), Path(cfg.output_dir)
    with in_use(folder):
        if is_first_process():
            print(f"training {cfg.name}, loading libraries …", flush=True)

        import lightning.pytorch as L

        from coca_lit.callbacks import samples_seen
        from coca_lit.data.datamodule import CaptionDataModule, RecordsDataModule
        from coca_lit.data.prefetch import worker_errors
        from coca_lit.distributed import print_rank_zero
        from coca_lit.models import part_sizes
        from coca_lit.models.generation.state import check_options
        from coca_lit.runs.results import finish_run, read_conditions, read_draws
        from coca_lit.runs.resume import (
            check_same_run,
            find_checkpoint,
            finished_results,
            forget_jobs,
            identity_of,
            is_requeued,
            resume_command,
        )
        from coca_lit.runs.scores import print_scores
        from coca_lit.training.objectives import needs_of
        from coca_lit.training.suitability import check_data, check_held_out
        from coca_lit.training.trainer import choose_fp32_matmul, prepare

        configure_libraries(cfg.threads, cfg.kernels.enabled, tf32=True)
        with error_context("seed"):
            L.seed_everything(cfg.seed, workers=True, verbose=False)
        strict = cfg.ckpt_path == NEWEST
        forget_jobs(folder)
        if is_requeued(folder):
            cfg = cfg.copy()
            cfg.ckpt_path = NEWEST
        start = find_checkpoint(folder, cfg.ckpt_path, is_first_process())
        resumed = start is not None and start.lies_in(folder)
        source = None if resumed else load_source(cfg)
        cfg = with_recipe(cfg, source, resumed)
        if start is not None and is_first_process():
            identity = identity_of(plain(cfg))
            check_same_run(start, identity, strict, argument_defaults(identity))
        if start is not None and (results := finished_results(cfg, start)) is not None:
            if is_first_process():
                images = {score: of.images for score, of in read_conditions(folder).items()}
                print_scores(results, read_draws(folder), images)
            return results
        module = build_module(cfg, start, source)
        data = build_data(cfg, module.net.tokenizer)  # before the evaluations: reported first if missing
        if start is not None and isinstance(data, CaptionDataModule):
            resume_data(data, start, strict)
        elif start is not None:
            print_rank_zero(f"note: {type(data).__name__} keeps no place: the epoch ends with its first batches")
        evals, not_run = build_evals(cfg)
        if start is None and isinstance(data, RecordsDataModule):
            held_out = {evaluation.name: evaluation.records for evaluation in evals}
            check_held_out(data.train_records, held_out)
        scoring = build_scoring(cfg, evals)
        generate = scoring.settings.generate or {}
        with error_context("scoring.generate"):
            check_options(module.net, generate)
        if start is None and isinstance(data, CaptionDataModule):
            read_captions = any(objective.reads_captions for objective in module.every_objective)
            of_pairs = bool(needs_of(module.every_objective))
            check_data(data, module.net, generate, read_captions, of_pairs)
        if cfg.scoring.objective is not None:
            scoring.check_score("scoring.objective", cfg.scoring.objective, at_end=True)
        else:
            check_study(evals)
        report = build(cfg.report, "report") if cfg.report is not None else None
        trainer = build_trainer(cfg, scoring, start, isinstance(data, CaptionDataModule))
        check_processes(trainer.world_size)
        prepare(trainer, module, data)
        if start is None:
            choose_fp32_matmul(trainer, module, cfg.kernels.fp32_matmul)
        # Not before: a run that cannot start leaves nothing behind.
        start_run_folder(cfg, start.run if start is not None and resumed else None, **chosen_experiment())
        try:
            with worker_errors():
                checkpoint = start.path if start is not None else None
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as stopped:  # by a signal, with everything saved
            if trainer.is_global_zero and not os.environ.get(SWEEP_VARIABLE):  # else it is the command of the sweep
                print(f"resume with: {resume_command(cfg.name, folder)}", flush=True)
            if isinstance(stopped.__context__, KeyboardInterrupt):  # Lightning's exit code is 1
                raise SystemExit(128 + signal.SIGINT) from stopped
            raise
        facts = {**samples_seen(trainer), "parameters": part_sizes(module.net)}
        if trainer.is_global_zero:
            scoring.found.not_run = not_run | scoring.found.not_run
            finish_run(folder, scoring.found, facts, report)
            if (folder / "checkpoints" / "last.ckpt").exists():
                print(f"next: {next_commands(cfg, module.net, data)}", flush=True)
        return scoring.found.scores


def next_commands(cfg: DictConfig, net: "CoCa", data: "CaptionDataModule") -> str:
    """Commands to use the model of a run: one for what its data show, and the scores if coca-evaluate repeats any."""
    from coca_lit.data.datamodule import ScenesDataModule

    own = OmegaConf.select(cfg, "data.records._target_") == OWN_PHOTOS
    photos = in_shell([str(cfg.data.root)]) if own else "FOLDER"
    if isinstance(data, ScenesDataModule):
        use = "coca-demo"  # which shows scenes; photos say nothing to this model
    else:
        use = f"coca-caption {photos}" if net.decoder is not None else f"coca-search {photos} TEXT"
    words = [f"checkpoint={cfg.output_dir}"] + ([f"imports=[{','.join(cfg.imports)}]"] if cfg.imports else [])
    commands = [use]
    # Own evaluations are not repeated: the config of a run folder may be a stranger's.
    if any(node and is_shipped("evals", name) for name, node in cfg.evals.items()):
        commands.append("coca-evaluate")
    return "   or   ".join(f"{command} {in_shell(words)}" for command in commands)


def chosen_experiment() -> dict[str, str]:
    """The name of the experiment, for reports; nothing where Hydra does not run, as in a test."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return {"experiment": choices["experiment"]} if choices.get("experiment") else {}


def resume_data(data: "CaptionDataModule", start: "Start", strict: bool) -> None:
    """Has the data read as when the checkpoint was written, before anything asks for their length: Lightning does so
    once more, under some strategies after that.

    Args:
        strict: refuse data that have changed; otherwise print a note.

    Raises:
        DataError: the data have changed.
    """
    from coca_lit.distributed import print_rank_zero

    state = start.content.get(type(data).__qualname__, {})
    data.load_state_dict(state)
    data.prepare_data()
    if not (changed := data.changed_since(state)):
        return
    if strict:
        raise DataError(
            f"{changed}: restore them, take another name, or set ckpt_path={start.path.resolve()} to resume all the "
            "same"
        )
    print_rank_zero(f"note: {changed}")

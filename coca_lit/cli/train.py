"""Training from the command line: `python train.py` and `coca-train`.

Heavy packages are imported inside functions, so that `--help` is answered at once.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from coca_lit.cli.assembly import build, build_data, build_evals, build_scoring, build_trainer, plain
from coca_lit.cli.command import is_shipped
from coca_lit.cli.module import build_module, load_source, with_recipe, with_start
from coca_lit.cli.runtime import choose_fp32_matmul, configure_libraries
from coca_lit.cli.schema import argument_defaults
from coca_lit.cli.sweep import SWEEP_VARIABLE, check_processes, check_search
from coca_lit.errors import DataError, error_context
from coca_lit.machine import in_shell, is_first_process
from coca_lit.runs.run_folder import NEWEST, in_use, start_run_folder

OWN_PHOTOS = "coca_lit.data.datasets.folder.folder_records"  # what reads them

if TYPE_CHECKING:
    import lightning.pytorch as L

    from coca_lit.callbacks import ScoreDuringTraining
    from coca_lit.data.datamodule import CaptionDataModule
    from coca_lit.lit_module import CoCaLit
    from coca_lit.models import CoCa, DualEncoder
    from coca_lit.runs.resume import ResumePoint


class Beginning(NamedTuple):
    """What a run begins with.

    Attributes:
        checkpoint: what it resumes from, if anything.
        ckpt_path: the key of this name; a job that its scheduler started again resumes from its newest checkpoint,
            whatever its command names.
        strict: whether to refuse a config or data that have changed since the checkpoint, instead of printing a note.
        source: the model in `init_from`; None for a run that goes on in its own folder. A run that starts from the
            checkpoint of another run needs it for its recipe alone.
    """

    checkpoint: "ResumePoint | None"
    ckpt_path: str | None
    strict: bool
    source: "DualEncoder | None"


@dataclass
class RunParts:
    """The objects of a run, ready to train."""

    module: "CoCaLit"
    data: "CaptionDataModule"
    trainer: "L.Trainer"
    scoring: "ScoreDuringTraining"
    report: Callable[..., Any] | None
    not_run: dict[str, str]  # evaluation -> why it cannot be computed


def run(cfg: DictConfig) -> dict[str, float]:
    """Trains as configured, scores the result and returns the scores; the run folder is `cfg.output_dir`."""
    cfg = with_start(cfg)
    folder = Path(cfg.output_dir)
    with in_use(folder):
        set_up_process(cfg)
        beginning = find_beginning(cfg)
        cfg, chosen = fill_config(cfg, beginning)
        check_unchanged(cfg, beginning)
        results = finished_scores(cfg, beginning.checkpoint)
        if results is not None:
            return results
        parts = build_run(cfg, beginning)
        # Not before: a run that cannot start leaves nothing behind.
        resumed = continues_own_folder(cfg, beginning.checkpoint)
        before = beginning.checkpoint.run if beginning.checkpoint is not None and resumed else None
        start_run_folder(cfg, before, chosen_experiment(), chosen)
        fit(cfg, parts, beginning.checkpoint)
        return finish(cfg, parts)


def set_up_process(cfg: DictConfig) -> None:
    """Loads and configures the libraries, and seeds all random generators."""
    if is_first_process():
        print(f"training {cfg.name}, loading libraries …", flush=True)

    import lightning.pytorch as L

    configure_libraries(cfg.threads, cfg.kernels.enabled, tf32=True)
    with error_context("seed"):
        L.seed_everything(cfg.seed, workers=True, verbose=False)


def find_beginning(cfg: DictConfig) -> Beginning:
    """The checkpoint that the run resumes from, or the model that it starts from."""
    from coca_lit.runs.resume import find_checkpoint, forget_earlier_jobs, is_requeued

    folder = Path(cfg.output_dir)
    forget_earlier_jobs(folder)
    ckpt_path = NEWEST if is_requeued(folder) else cfg.ckpt_path
    checkpoint = find_checkpoint(folder, ckpt_path, is_first_process())
    source = None if continues_own_folder(cfg, checkpoint) else load_source(cfg)
    return Beginning(checkpoint, ckpt_path, cfg.ckpt_path == NEWEST, source)


def continues_own_folder(cfg: DictConfig, checkpoint: "ResumePoint | None") -> bool:
    """Whether the run continues in its own folder; it may also start from a checkpoint of another run."""
    return checkpoint is not None and checkpoint.lies_in(Path(cfg.output_dir))


def fill_config(cfg: DictConfig, beginning: Beginning) -> tuple[DictConfig, list[str]]:
    """The config with the checkpoint that the run resumes from, and the values that its recipe chooses; and why."""
    cfg = cfg.copy()
    cfg.ckpt_path = beginning.ckpt_path
    return with_recipe(cfg, beginning.source, continues_own_folder(cfg, beginning.checkpoint))


def check_unchanged(cfg: DictConfig, beginning: Beginning) -> None:
    """Compares the config with that of the checkpoint; see `check_same_run`."""
    from coca_lit.runs.resume import check_same_run, identity_of

    if beginning.checkpoint is not None and is_first_process():
        identity = identity_of(plain(cfg))
        check_same_run(beginning.checkpoint, identity, beginning.strict, argument_defaults(identity))


def finished_scores(cfg: DictConfig, checkpoint: "ResumePoint | None") -> dict[str, float] | None:
    """The scores of a run that has nothing left to do, printed; None for any other run."""
    from coca_lit.runs.results import print_with_conditions, read_conditions, read_draws
    from coca_lit.runs.resume import finished_results

    results = finished_results(cfg, checkpoint) if checkpoint is not None else None
    if results is not None and is_first_process():
        folder = Path(cfg.output_dir)
        print_with_conditions(results, read_draws(folder), read_conditions(folder))
    return results


def build_run(cfg: DictConfig, beginning: Beginning) -> RunParts:
    """Builds the parts of a run from its config, and checks that they fit each other."""
    from coca_lit.data.datamodule import CaptionDataModule
    from coca_lit.training.trainer import prepare

    checkpoint = beginning.checkpoint
    module = build_module(cfg, checkpoint, beginning.source)
    data = build_data(cfg, module.net.tokenizer)  # before the evaluations: reported first if missing
    if checkpoint is not None:
        resume_data(data, checkpoint, beginning.strict)
    evals, not_run = build_evals(cfg)
    scoring = build_scoring(cfg, evals)
    check_parts(module, data, scoring, is_new=checkpoint is None)
    if cfg.scoring.objective is not None:
        scoring.check_score("scoring.objective", cfg.scoring.objective, at_end=True)
    else:
        check_search(evals)
    report = build(cfg.report, "report") if cfg.report is not None else None
    trainer = build_trainer(cfg, scoring, checkpoint, isinstance(data, CaptionDataModule))
    check_processes(trainer.world_size)
    prepare(trainer, module, data)
    if checkpoint is None:
        choose_fp32_matmul(trainer, module, cfg.kernels.fp32_matmul)
    return RunParts(module, data, trainer, scoring, report, not_run)


def check_parts(module: "CoCaLit", data: "CaptionDataModule", scoring: "ScoreDuringTraining", *, is_new: bool) -> None:
    """Raises an error if the network cannot generate as the evaluations ask; of a new run also if its data do not suit
    the network and its losses, or hold records of the evaluations.
    """
    from coca_lit.data.datamodule import CaptionDataModule, RecordsDataModule
    from coca_lit.models.generation.state import check_options
    from coca_lit.training.objectives import needs_of
    from coca_lit.training.suitability import check_data, check_held_out

    if is_new and isinstance(data, RecordsDataModule):
        held_out = {evaluation.name: evaluation.records for evaluation in scoring.evals}
        check_held_out(data.train_records, held_out)
    generate = scoring.settings.generate or {}
    with error_context("scoring.generate"):
        check_options(module.net, generate)
    if is_new and isinstance(data, CaptionDataModule):
        read_captions = any(objective.reads_captions for objective in module.every_objective)
        of_pairs = bool(needs_of(module.every_objective))
        check_data(data, module.net, generate, read_captions, of_pairs)


def fit(cfg: DictConfig, parts: RunParts, checkpoint: "ResumePoint | None") -> None:
    """Trains. A signal ends the process here, with everything saved."""
    from coca_lit.data.prefetch import worker_errors
    from coca_lit.runs.resume import resume_command
    from coca_lit.training.lightning_fixes import error_of_an_ended_rank

    path = checkpoint.path if checkpoint is not None else None
    try:
        with worker_errors(), error_of_an_ended_rank(parts.trainer):
            parts.trainer.fit(parts.module, datamodule=parts.data, ckpt_path=path, weights_only=True)
    except SystemExit as stopped:
        if parts.trainer.is_global_zero and not os.environ.get(SWEEP_VARIABLE):  # else it is the command of the sweep
            print(f"resume with: {resume_command(cfg.name, Path(cfg.output_dir))}", flush=True)
        if isinstance(stopped.__context__, KeyboardInterrupt):  # Lightning's exit code is 1
            raise SystemExit(128 + signal.SIGINT) from stopped
        raise


def finish(cfg: DictConfig, parts: RunParts) -> dict[str, float]:
    """Writes the results of a trained run, says what to do with it, and returns its scores.

    Raises:
        TrainingError: the disk is too full for its weights.
    """
    from coca_lit.callbacks import Checkpoints, samples_seen
    from coca_lit.models import part_sizes
    from coca_lit.runs.results import finish_run
    from coca_lit.training.lightning_fixes import callbacks_of

    folder = Path(cfg.output_dir)
    found = parts.scoring.found
    trained = {**samples_seen(parts.trainer), "parameters": part_sizes(parts.module.net)}
    if parts.trainer.is_global_zero:
        found.not_run = parts.not_run | found.not_run
        finish_run(folder, found, trained, parts.report)
        for checkpoints in callbacks_of(parts.trainer, Checkpoints):
            checkpoints.check_saved(parts.trainer)
        if (folder / "checkpoints" / "last.ckpt").exists():
            print(f"next: {next_commands(cfg, parts.module.net, parts.data)}", flush=True)
    return found.scores


def next_commands(cfg: DictConfig, net: "CoCa", data: "CaptionDataModule") -> str:
    """Commands to use the model of a run: one for what its data show, and the scores if coca-evaluate repeats any."""
    from coca_lit.data.datamodule import ScenesDataModule

    has_photos = OmegaConf.select(cfg, "data.records._target_") == OWN_PHOTOS
    photos = in_shell([str(cfg.data.root)]) if has_photos else "FOLDER"
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


def chosen_experiment() -> str | None:
    """The name of the experiment, for reports; None where Hydra does not run, as in a test."""
    return HydraConfig.get().runtime.choices.get("experiment") if HydraConfig.initialized() else None


def resume_data(data: "CaptionDataModule", start: "ResumePoint", strict: bool) -> None:
    """Has the data read as when the checkpoint was written, before anything asks for their length: Lightning does so
    once more, under some strategies after that.

    Args:
        strict: refuse data that have changed; otherwise print a note.

    Raises:
        DataError: the data have changed.
    """
    from coca_lit.data.datamodule import CaptionDataModule
    from coca_lit.distributed import print_rank_zero

    if not isinstance(data, CaptionDataModule):
        print_rank_zero(f"note: {type(data).__name__} keeps no place: the epoch ends with its first batches")
        return
    state = start.content.get(type(data).__qualname__, {})
    data.load_state_dict(state)
    data.prepare_data()
    changed = data.changed_since(state)
    if not changed:
        return
    if strict:
        raise DataError(
            f"{changed}: restore them, take another name, or set ckpt_path={start.path.resolve()} to resume all the "
            "same"
        )
    print_rank_zero(f"note: {changed}")

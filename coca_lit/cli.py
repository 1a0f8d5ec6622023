"""Training from the command line, and what every command shares: compose a config, build the parts, explain mistakes.

Heavy packages are imported inside functions, so that `--help` and a typing error answer at once.
"""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from coca_lit.arguments import Positional, to_overrides
from coca_lit.config import (
    ConfigError,
    EvaluateConfig,
    TrainConfig,
    blame,
    build,
    check_hydra,
    explain_override,
    suggest,
)
from coca_lit.launch import is_first_process, job_folder, launched_devices, launched_nodes, run_id
from coca_lit.objective import headline
from coca_lit.redaction import redact_configs
from coca_lit.sweep import check_direction, check_processes, print_sweep

if TYPE_CHECKING:
    import lightning.pytorch as L

    from coca_lit.callbacks import Evaluation

PACKAGE = Path(__file__).resolve().parent
# In a checkout the configs lie beside the package, in a wheel inside it.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())

ConfigStore.instance().store("train_schema", TrainConfig)
ConfigStore.instance().store("evaluate_schema", EvaluateConfig)
OmegaConf.register_new_resolver("run_id", run_id, use_cache=True, replace=True)
for resolver in (job_folder, launched_devices, launched_nodes):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def train() -> None:
    """Entry point of `python train.py` and `coca-train`."""
    if any(word.startswith("plan=") and word not in ("plan=false", "plan=null") for word in sys.argv):
        sys.argv += ["hydra.output_subdir=null", "hydra.run.dir=."]  # a plan is no run: no folder
    command("train", train_job)


def train_job(cfg: DictConfig) -> float | None:
    """`run` for Hydra, whose sweepers ask for one number: the score called `cfg.objective`."""
    if cfg.plan:
        from coca_lit.plan.cli import show_plan

        show_plan(cfg)
        return None
    check_direction(cfg.objective)
    results = run(cfg)
    score = cfg.objective or headline(results)
    if results and score is not None and score not in results:
        raise ConfigError(
            f"objective: there is no score '{score}'{suggest(score, results)} Scores: {', '.join(results)}"
        )
    return results[score] if results and score is not None else None


def command(config: str, function: Callable[[DictConfig], Any], positional: Positional = ()) -> None:
    """Runs `function` on the composed `conf/{config}.yaml`. Mistakes of the user are one sentence on standard
    error and exit code 1.

    Args:
        positional: the keys of arguments that are given without one, see `to_overrides`.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed by Hydra
    redact_configs()
    check_what_hydra_builds()
    try:
        sys.argv[1:] = to_overrides(sys.argv[1:], positional)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config)(function)()
    except user_errors() as error:
        sys.exit(f"error: {_explain(error, config)}")
    finally:
        print_sweep()


def check_what_hydra_builds() -> None:
    """Puts our check between Hydra's composing of a config and its building of callbacks, launchers and log handlers.
    There is no public place for it.
    """
    load = ConfigLoaderImpl.load_configuration
    if getattr(load, "checked", False):
        return

    @functools.wraps(load)
    def checked(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        cfg = load(self, *args, **kwargs)
        if "hydra" in cfg:
            check_hydra(OmegaConf.to_container(cfg.hydra, resolve=False))
        return cfg

    checked.checked = True  # type: ignore[attr-defined]  # a mark on a function
    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]  # see above


def run(cfg: DictConfig) -> dict[str, float]:
    """Trains as configured, scores the result and returns the scores; the run folder is `cfg.output_dir`."""
    import lightning.pytorch as L

    from coca_lit.callbacks import SamplesSeen
    from coca_lit.distributed import say
    from coca_lit.fp32 import choose_fp32_products
    from coca_lit.resume import read_run
    from coca_lit.run_folder import finished_results, start_run_folder, write_results
    from coca_lit.setup_checks import check_batch_size

    configure_libraries(cfg)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    checkpoint = find_start(cfg)
    if checkpoint is not None and (results := finished_results(cfg, checkpoint)) is not None:
        return results
    start_run_folder(cfg, checkpoint)
    module = build_module(cfg)
    data = build(cfg.data, "data", tokenizer=module.net.tokenizer)
    data.prepare_data()  # missing training data are said first, before those of an evaluation
    evals, not_run = build_evals(cfg)
    trainer = build_trainer(cfg, evals)
    check_processes(trainer.world_size)
    with blame("data.batch_size"):
        check_batch_size(cfg.data.batch_size, trainer.world_size, cfg.trainer.micro_batch_size)
    if trainer.strategy.root_device.type == "cpu" and trainer.precision == "32-true":
        before = read_run(checkpoint).get("fp32_products") if checkpoint is not None else None
        say(f"fp32 products: {choose_fp32_products(sum(p.numel() for p in module.net.parameters()), before)}")
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    for evaluation in evals:
        not_run |= evaluation.not_run
    results = {name: value for evaluation in evals for name, value in evaluation.results.items()}
    seen = next((c.total() for c in getattr(trainer, "callbacks", []) if isinstance(c, SamplesSeen)), {})
    if trainer.is_global_zero:
        write_results(Path(cfg.output_dir), results, not_run, seen)
    return results


def find_start(cfg: DictConfig) -> Path | None:
    """The checkpoint to go on from, or None for a new start. The first process checks that it fits this config."""
    from coca_lit.resume import AUTO, check_same_run, decisive, find_checkpoint

    checkpoint = find_checkpoint(Path(cfg.output_dir), cfg.ckpt_path, is_first_process())
    if checkpoint is not None and is_first_process():
        check_same_run(checkpoint, decisive(plain(cfg)), strict=cfg.ckpt_path == AUTO)
    return checkpoint


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A config as plain values, with interpolations left as they are: they may stand for secrets."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))


def build_module(cfg: DictConfig) -> Any:
    """The LightningModule with its network, started from given weights if there are any."""
    from coca_lit.checkpoints import load_image_weights, load_weights

    module = build(cfg.model, "model", micro_batch_size=cfg.trainer.micro_batch_size)
    with blame("model.optimizer"):
        module.make_optimizer(module.net)  # a wrong learning rate should fail now, not after the data are read
    if cfg.image_weights is not None:
        with blame("image_weights"):
            load_image_weights(module.net, cfg.image_weights)
    if cfg.init_from is not None:
        with blame("init_from"):
            load_weights(module.net, cfg.init_from)
    return module


def build_evals(cfg: DictConfig) -> "tuple[list[Evaluation], dict[str, str]]":
    """The evaluations of a config, and with `skip_missing` the reason for each one whose data cannot be read."""
    from coca_lit.data.records import DataError
    from coca_lit.distributed import say

    evals, missing = [], {}
    for name, node in cfg.evals.items():
        try:
            evals += [build(node, f"evals.{name}")] if node else []
        except DataError as error:
            if not cfg.skip_missing:
                raise
            missing[name] = str(error)
            say(f"skipped {name}: {error}")
    return evals, missing


def build_trainer(cfg: DictConfig, evals: "list[Evaluation]") -> "L.Trainer":
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    from coca_lit.callbacks import Averaging, Checkpoints
    from coca_lit.checkpoint_io import SafeCheckpointIO
    from coca_lit.resume import decisive
    from coca_lit.setup_checks import check_strategy

    # Averaged weights replace the trained ones when training ends: after the last checkpoint, before the final scores.
    with blame("ema"):
        averaging: list[L.Callback] = [Averaging(decay=cfg.ema)] if cfg.ema is not None else []
    callbacks = [build(node, f"callbacks.{name}") for name, node in cfg.callbacks.items() if node]
    first = [callback for callback in callbacks if isinstance(callback, Checkpoints)]
    for checkpoints in first:
        checkpoints.config = decisive(plain(cfg))
    others = [callback for callback in callbacks if callback not in first]
    loggers = [build(node, f"logger.{name}") for name, node in cfg.logger.items() if node]
    precision = best_precision() if cfg.trainer.precision == "auto" else cfg.trainer.precision
    strategy = cfg.trainer.strategy
    if isinstance(strategy, DictConfig):
        strategy = build(strategy, "trainer.strategy")
    with blame("trainer"):
        check_strategy(strategy, precision, cfg.ema, cfg.trainer.micro_batch_size)
    # Requeueing is ours: Lightning would save within the signal handler, wherever the step may be.
    under_srun = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    slurm = [SLURMEnvironment(auto_requeue=False)] if under_srun else []
    parts = {
        "callbacks": [*first, *averaging, *evals, *others],
        "logger": loggers,
        "precision": precision,
        "strategy": strategy,
        "plugins": [SafeCheckpointIO(), *slurm],
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in others),  # no default one
    }
    return build(_without(cfg.trainer, "micro_batch_size"), "trainer", **parts)


def _without(node: DictConfig, key: str) -> DictConfig:
    """The node without a key that is not for its target."""
    node = node.copy()
    with open_dict(node):
        node.pop(key)
    return node


def configure_libraries(cfg: DictConfig) -> None:
    import torch

    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    # Lightning's notices would drown ours; its warnings stay, but for those that a user need not act on.
    for name in ("lightning.pytorch", "lightning.fabric"):
        lightning_log = logging.getLogger(name)
        lightning_log.setLevel(logging.WARNING)
        lightning_log.propagate = False
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # frozen parts: on purpose
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # no validation set


def best_precision() -> str:
    """bf16 mixed precision where the device computes it in hardware, else fp32."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() else "32-true"


def user_errors() -> tuple[type[Exception], ...]:
    """Exceptions whose message is all that a user needs; anything else is a bug and keeps its traceback."""
    errors: tuple[type[Exception], ...] = (ConfigError, HydraException, OmegaConfBaseException, yaml.YAMLError)
    if "coca_lit.data.records" not in sys.modules:  # no data were touched, so the class need not be imported
        return (*errors, FileNotFoundError)
    from coca_lit.callbacks.step_guard import TrainingError
    from coca_lit.checkpoint_io import CheckpointError
    from coca_lit.data.records import DataError

    return (*errors, CheckpointError, DataError, FileNotFoundError, TrainingError)


def _explain(error: Exception, config: str) -> str:
    if isinstance(error, HydraException):
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            options = GlobalHydra.instance().config_loader().get_group_options
            chosen = [arg for arg in sys.argv[1:] if arg.rpartition("=")[2] in options(arg.partition("=")[0])]
            return explain_override(error, lambda: hydra.compose(config, chosen), options)
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark) is not None:
        return f"'{mark.name}', line {mark.line + 1}: {error.problem}"
    if isinstance(error.__cause__, ConfigError):  # raised while a value was resolved
        return str(error.__cause__)
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    message = str(error).strip().splitlines()[-1]  # from a worker process it comes after a traceback and a name
    return message.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")

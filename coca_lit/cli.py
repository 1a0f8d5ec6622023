"""Training from the command line, and what every command shares: compose a config, build the parts, explain mistakes.

Heavy packages are imported inside functions, so that `--help` and a typing error answer at once.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from coca_lit.arguments import Positional, to_overrides
from coca_lit.config import ConfigError, EvaluateConfig, TrainConfig, blame, build, explain_override, suggest
from coca_lit.launch import job_folder, launched_devices, launched_nodes, run_id
from coca_lit.objective import headline
from coca_lit.redaction import redact_configs
from coca_lit.sweep import check_direction, check_processes, print_sweep

if TYPE_CHECKING:
    import lightning.pytorch as L

    from coca_lit.callbacks import Evaluation
    from coca_lit.models import CoCa

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
    command("train", train_job)


def train_job(cfg: DictConfig) -> float | None:
    """`run` for Hydra, whose sweepers ask for one number: the score called `cfg.objective`."""
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
    try:
        sys.argv[1:] = to_overrides(sys.argv[1:], positional)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config)(function)()
    except user_errors() as error:
        sys.exit(f"error: {_explain(error, config)}")
    finally:
        print_sweep()


def run(cfg: DictConfig) -> dict[str, float]:
    """Trains as configured, scores the result and returns the scores; the run folder is `cfg.output_dir`."""
    import lightning.pytorch as L

    from coca_lit.distributed import say
    from coca_lit.fp32 import choose_fp32_products
    from coca_lit.run_folder import start_run_folder, write_results
    from coca_lit.setup_checks import check_batch_size

    configure_libraries(cfg)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    start_run_folder(cfg)
    module = build_module(cfg)
    data = build(cfg.data, "data", tokenizer=module.net.tokenizer)
    data.prepare_data()  # missing training data are said first, before those of an evaluation
    evals, not_run = build_evals(cfg)
    trainer = build_trainer(cfg, evals)
    check_processes(trainer.world_size)
    with blame("data.batch_size"):
        check_batch_size(cfg.data.batch_size, trainer.world_size, cfg.trainer.micro_batch_size)
    if trainer.strategy.root_device.type == "cpu" and trainer.precision == "32-true":
        say(f"fp32 products: {choose_fp32_products(sum(p.numel() for p in module.net.parameters()))}")
    trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
    for evaluation in evals:
        not_run |= evaluation.not_run
    results = {name: value for evaluation in evals for name, value in evaluation.results.items()}
    if trainer.is_global_zero:
        write_results(Path(cfg.output_dir), results, not_run)
    return results


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
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from coca_lit.setup_checks import check_strategy

    # Averaged weights replace the trained ones when training ends: before the final scores.
    with blame("ema"):
        averaging: list[L.Callback] = [EMAWeightAveraging(decay=cfg.ema)] if cfg.ema is not None else []
    callbacks = [build(node, f"callbacks.{name}") for name, node in cfg.callbacks.items() if node]
    loggers = [build(node, f"logger.{name}") for name, node in cfg.logger.items() if node]
    precision = best_precision() if cfg.trainer.precision == "auto" else cfg.trainer.precision
    strategy = cfg.trainer.strategy
    if isinstance(strategy, DictConfig):
        strategy = build(strategy, "trainer.strategy")
    with blame("trainer"):
        check_strategy(strategy, precision, cfg.ema, cfg.trainer.micro_batch_size)
    parts = {
        "callbacks": [*averaging, *evals, *callbacks],
        "logger": loggers,
        "precision": precision,
        "strategy": strategy,
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


def load_checkpoint(path: str) -> "CoCa":
    """The model in a file; one that holds something else is a mistake in the key `checkpoint`."""
    from coca_lit.checkpoints import load_model

    with blame("checkpoint"):
        return load_model(path)


def best_precision() -> str:
    """bf16 mixed precision where the device computes it in hardware, else fp32."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() else "32-true"


def user_errors() -> tuple[type[Exception], ...]:
    """Exceptions whose message is all that a user needs; anything else is a bug and keeps its traceback."""
    errors: tuple[type[Exception], ...] = (ConfigError, HydraException, OmegaConfBaseException)
    if "coca_lit.data.records" not in sys.modules:  # no data were touched, so the class need not be imported
        return (*errors, FileNotFoundError)
    from coca_lit.data.records import DataError

    return (*errors, DataError, FileNotFoundError)


def _explain(error: Exception, config: str) -> str:
    if isinstance(error, HydraException):
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            options = GlobalHydra.instance().config_loader().get_group_options
            chosen = [arg for arg in sys.argv[1:] if arg.rpartition("=")[2] in options(arg.partition("=")[0])]
            return explain_override(error, lambda: hydra.compose(config, chosen), options)
    if isinstance(error.__cause__, ConfigError):  # raised while a value was resolved
        return str(error.__cause__)
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    return str(error).strip().splitlines()[-1]  # from a worker process the message comes after its traceback

"""The parts of a run, each built from its part of the config."""

from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from coca_lit.cli.config import build
from coca_lit.cli.runtime import best_precision
from coca_lit.errors import error_context

if TYPE_CHECKING:
    import lightning.pytorch as L

    from coca_lit.callbacks import ScoreDuringTraining
    from coca_lit.data.datamodule import CaptionDataModule
    from coca_lit.evals import Evaluation, Settings
    from coca_lit.lit_module import CoCaLit
    from coca_lit.models import CoCa
    from coca_lit.tokenizer import Tokenizer

WHEN = ("every_n_epochs", "every_n_steps", "quick")  # keys of `scoring` that concern training alone


def build_data(cfg: DictConfig, tokenizer: "Tokenizer") -> "CaptionDataModule":
    """The training data, found; raises `DataError` if they are not there."""
    data = build(cfg.data, "data", tokenizer=tokenizer)
    data.prepare_data()
    return data


def build_module(cfg: DictConfig) -> "CoCaLit":
    """The LightningModule with its network, started from given weights if there are any."""
    from coca_lit.weights.load import load_image_weights, load_weights

    module = build(cfg.model, "model", micro_batch_size=cfg.trainer.micro_batch_size)
    if cfg.image_weights is not None:
        with error_context("image_weights"):
            load_image_weights(module.net, cfg.image_weights)
    if cfg.init_from is not None:
        with error_context("init_from"):
            load_weights(module.net, cfg.init_from)
    add_adapters(cfg, module.net)
    with error_context("model.optimizer"):
        module.make_optimizer(module.net)  # a wrong learning rate should fail now, not after the data are read
    return module


def add_adapters(cfg: DictConfig, net: "CoCa") -> None:
    """Low-rank adaptation, if it is asked for: after weights have been loaded, because it gives them other names."""
    from coca_lit.distributed import print_rank_zero

    if cfg.lora.rank:
        adapted = build(cfg.lora, "lora", net=net)
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        print_rank_zero(
            f"low-rank updates of {len(adapted)} matrices of {', '.join(cfg.lora.parts)}; {trained:,} numbers train"
        )


def with_vocabulary(cfg: DictConfig) -> DictConfig:
    """The config with the words of the training captions as the network's tokenizer, if it asks for them. Checkpoints
    hold the list.
    """
    from coca_lit.distributed import print_rank_zero
    from coca_lit.tokenizer import frequent_words

    if cfg.vocabulary is None:
        return cfg
    groups = build(cfg.data, "data", tokenizer=None).training_captions().values()
    words = frequent_words((caption for captions in groups for caption in captions), cfg.vocabulary)
    print_rank_zero(
        f"vocabulary: {len(words)} words that occur at least {cfg.vocabulary} times in the training captions"
    )
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.model.net.tokenizer = words
    return cfg


def build_evals(cfg: DictConfig) -> "tuple[list[Evaluation], dict[str, str]]":
    """The evaluations of a config, and with `skip_missing` the reason for each one whose data cannot be read."""
    from coca_lit.distributed import print_rank_zero
    from coca_lit.errors import DataError

    evals, missing = [], {}
    for name, node in cfg.evals.items():
        try:
            evals += [build(node, f"evals.{name}")] if node else []
        except DataError as error:
            if not cfg.skip_missing:
                raise
            missing[name] = str(error)
            print_rank_zero(f"skipped {name}: {error}")
    return evals, missing


def build_settings(cfg: DictConfig) -> "Settings":
    """What the evaluations share."""
    from coca_lit.evals import Settings

    node = _without(cfg.scoring, *WHEN)
    node._target_ = f"{Settings.__module__}.{Settings.__qualname__}"
    return build(node, "scoring", output_dir=cfg.output_dir)


def build_scoring(cfg: DictConfig, evals: "list[Evaluation]") -> "ScoreDuringTraining":
    """The callback that runs the evaluations during training and at its end."""
    from coca_lit.callbacks import ScoreDuringTraining

    with error_context("scoring"):
        return ScoreDuringTraining(evals, build_settings(cfg), **{key: cfg.scoring[key] for key in WHEN})


def build_trainer(cfg: DictConfig, scoring: "ScoreDuringTraining") -> "L.Trainer":
    """The trainer with its callbacks, `scoring` among them, loggers, strategy and precision."""
    from lightning.pytorch.callbacks import Checkpoint

    from coca_lit.runs.setup_checks import check_strategy

    callbacks = build_callbacks(cfg, scoring)
    precision = best_precision() if cfg.trainer.precision == "auto" else cfg.trainer.precision
    strategy = cfg.trainer.strategy
    if isinstance(strategy, DictConfig):
        strategy = build(strategy, "trainer.strategy")
    with error_context("trainer"):
        further = {
            "lora": bool(cfg.lora.rank),
            "auxiliary": bool(cfg.model.auxiliary),
            "self_critical": cfg.model.self_critical is not None,
        }
        check_strategy(strategy, precision, cfg.ema, cfg.trainer.micro_batch_size, **further)
    parts = {
        "callbacks": callbacks,
        "logger": [build(node, f"logger.{name}") for name, node in cfg.logger.items() if node],
        "precision": precision,
        "strategy": strategy,
        "plugins": build_plugins(),
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),  # no default one
    }
    return build(_without(cfg.trainer, "micro_batch_size"), "trainer", **parts)


def build_callbacks(cfg: DictConfig, scoring: "ScoreDuringTraining") -> "list[L.Callback]":
    """In the order in which they must act. Averaged weights replace the trained ones when training ends: after the
    last checkpoint, before the final scores.
    """
    from coca_lit.callbacks import Averaging, Checkpoints
    from coca_lit.runs.resume import resume_keys

    callbacks = [build(node, f"callbacks.{name}") for name, node in cfg.callbacks.items() if node]
    checkpoints = [callback for callback in callbacks if isinstance(callback, Checkpoints)]
    for callback in checkpoints:
        callback.config = resume_keys(plain(cfg))
    with error_context("ema"):
        averaging = [Averaging(decay=cfg.ema)] if cfg.ema is not None else []
    return [*checkpoints, *averaging, scoring, *(callback for callback in callbacks if callback not in checkpoints)]


def build_plugins() -> list[Any]:
    from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    from coca_lit.training.checkpoint_plugin import SafeCheckpointIO

    # Requeueing is ours: Lightning would save within the signal handler, wherever the step may be.
    under_srun = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SafeCheckpointIO(), *([SLURMEnvironment(auto_requeue=False)] if under_srun else [])]


def _without(node: DictConfig, *keys: str) -> DictConfig:
    """A copy of the node, open for further keys, without those that are not for its target."""
    copy = node.copy()
    OmegaConf.set_struct(copy, False)
    for key in keys:
        copy.pop(key, None)
    return copy


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A config as plain values, with interpolations left as they are: they may stand for secrets."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))

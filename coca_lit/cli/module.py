"""From a composed config to the LightningModule of a run: its network, started from weights if the config names any."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from coca_lit.cli.assembly import build
from coca_lit.errors import ConfigError, error_context

if TYPE_CHECKING:
    from coca_lit.lit_module import CoCaLit
    from coca_lit.models import CoCa, DualEncoder
    from coca_lit.runs.resume import Start


def load_source(cfg: DictConfig) -> "DualEncoder | None":
    """The model in `init_from`, if any."""
    if cfg.init_from is None:
        return None

    from coca_lit.weights.load import load_dual_encoder

    with error_context("init_from"):
        return load_dual_encoder(cfg.init_from)


def build_module(cfg: DictConfig, start: "Start | None" = None, source: "DualEncoder | None" = None) -> "CoCaLit":
    """The LightningModule with its network, started from given weights if there are any.

    Args:
        start: what the run resumes from; its weights will replace any others.
        source: the model in `init_from`, if it is loaded already.
    """
    if start is not None:
        from coca_lit.weights import MODEL_KEY
        from coca_lit.weights.load import architecture

        with error_context("ckpt_path"):
            cfg = with_facts(cfg, architecture(start.content.get(MODEL_KEY, {}), start.path), start.path)
        source = None
    elif (source := source or load_source(cfg)) is not None:
        with error_context("init_from"):
            cfg = with_facts(cfg, source, cfg.init_from)
    optimizer = build(cfg.model.optimizer, "model.optimizer")
    module = make_module(cfg, cfg.model, optimizer=optimizer)
    if start is None:
        initialise(cfg, module.net, source)
    add_adapters(cfg, module.net)
    if start is not None and cfg.data.get("cached_augmentations"):  # photos are encoded before Lightning restores these
        from coca_lit.training.trainer import SafeCheckpointIO

        module.load_state_dict(SafeCheckpointIO().load_checkpoint(start.path)["state_dict"])
    if not any(p.requires_grad for p in module.net.parameters()):
        raise ConfigError("model.freeze: nothing is left to train, all parameters of the network are frozen")
    return module


def initialise(cfg: DictConfig, net: "CoCa", source: "DualEncoder | None" = None) -> None:
    """Starts the network from the weights that the config names.

    Args:
        source: the model in `init_from`.
    """
    parts = cfg.init_parts
    if source is None and parts.image_encoder is None and parts.decoder is None:
        return  # as most trainings do, which need not import a dozen modules for this

    from coca_lit.weights.start import copy_weights, load_image_weights, load_language_model

    given: list[str] = []
    if parts.image_encoder is not None:
        with error_context("init_parts.image_encoder"):
            load_image_weights(net, parts.image_encoder)
    if source is not None:
        with error_context("init_from"):
            given = copy_weights(source, net, cfg.init_from)
    if parts.decoder is not None:
        with error_context("init_parts.decoder"):
            load_language_model(net, parts.decoder, given)


def with_facts(cfg: DictConfig, source: "DualEncoder | Mapping[str, Any]", where: str | Path) -> DictConfig:
    """The config with what the tensors of some weights do not show, such as their CLS mask, taken from them.

    Args:
        source: the model, or the config of one.

    Raises:
        ValueError: the config chooses something else.
    """
    from coca_lit.distributed import print_rank_zero
    from coca_lit.models import CoCa
    from coca_lit.models.presets import preset
    from coca_lit.weights.computation import arguments_of, merge

    if cfg.model.net._target_ != "coca_lit.models.create_model":
        return cfg  # a network of the user's own; `copy_weights` compares it with the source
    net = cast(dict[str, Any], OmegaConf.to_container(cfg.model.net, resolve=True))
    own = preset(net["name"])
    merged = merge(net, own, arguments_of(source), str(where))
    defaults = {name: p.default for name, p in inspect.signature(CoCa).parameters.items()}
    without = defaults | own | {name: value for name, value in net.items() if value is not None}
    if taken := [f"{name}={value}" for name, value in merged.items() if value != without.get(name)]:
        print_rank_zero(f"as the weights in {where}: {', '.join(taken)}")
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.model.net = net | merged
    return cfg


def make_module(cfg: DictConfig, model: DictConfig, **objects: Any) -> "CoCaLit":
    """What the node `model` describes, with all that it takes from the data and the trainer of the config."""
    texts = {"texts": cfg.data.get("text") is not None}
    module: CoCaLit = build(model, "model", texts, micro_batch_size=cfg.trainer.micro_batch_size, **objects)
    return module


def add_adapters(cfg: DictConfig, net: "CoCa") -> None:
    """Low-rank adaptation, if `lora.rank` is set: after weights have been loaded, because it renames them."""
    from coca_lit.distributed import print_rank_zero

    if cfg.lora.rank:
        adapted = build(cfg.lora, "lora", net=net)
        parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in adapted))
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        print_rank_zero(f"low-rank updates of {len(adapted)} matrices of {parts}, {trained:,} parameters train")

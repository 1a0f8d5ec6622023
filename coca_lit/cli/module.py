"""From a composed config to the LightningModule of a run: its network, started from weights if the config names any."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from coca_lit import extensions
from coca_lit.cli.assembly import build, build_schedule, data_place
from coca_lit.cli.schema import AUTO, BATCH_SCHEDULE, leaves, unresolved, written
from coca_lit.errors import ConfigError, error_context

if TYPE_CHECKING:
    from coca_lit.lit_module import CoCaLit
    from coca_lit.models import CoCa, DualEncoder
    from coca_lit.runs.resume import ResumePoint
    from coca_lit.training.objectives import Objective

REQUIRED = "required"  # `init_from` of an experiment that trains a model further
SMOKE_STEPS = 2  # of trainer=smoke


def load_source(cfg: DictConfig) -> "DualEncoder | None":
    """The model in `init_from`, if that names one yet."""
    if cfg.init_from in (None, AUTO):
        return None

    from coca_lit.weights.load import load_dual_encoder

    with error_context("init_from"):
        return load_dual_encoder(cfg.init_from)


def build_module(cfg: DictConfig, start: "ResumePoint | None" = None, source: "DualEncoder | None" = None) -> "CoCaLit":
    """The LightningModule with its network, started from given weights if there are any.

    Args:
        start: what the run resumes from; its weights will replace any others.
        source: the model in `init_from`, if it is loaded already.
    """
    if start is not None:
        from coca_lit.tokenizer import is_same
        from coca_lit.weights import MODEL_KEY
        from coca_lit.weights.load import architecture

        with error_context("ckpt_path"):
            theirs = architecture(start.content.get(MODEL_KEY, {}), start.path)
        cfg = with_vocabulary(cfg, theirs.get("tokenizer"))
        with error_context("ckpt_path"):
            cfg = with_arguments_of(cfg, theirs, start.path)
        source = None
    else:
        source = source or load_source(cfg)
        cfg = with_vocabulary(cfg, source.tokenizer.spec if source is not None else None)
        if source is not None:
            with error_context("init_from"):
                cfg = with_arguments_of(cfg, source, cfg.init_from)
    optimizer = build(cfg.model.optimizer, "model.optimizer")
    module = make_module(cfg, cfg.model, optimizer=optimizer)
    if start is None:
        initialise(cfg, module.net, source)
        for objective in module.every_objective:
            objective.begin(module.net)
    else:
        spec = module.net.tokenizer.spec
        if isinstance(spec, dict) and not is_same(spec, theirs.get("tokenizer", spec)):  # a file, which has one name
            raise ConfigError("model.net.tokenizer: it has changed since the checkpoint: restore it, or set a new name")
        check_kept(module, start)
    add_adapters(cfg, module)
    if start is not None and cfg.data.get("cached_augmentations"):  # photos are encoded before Lightning restores these
        from coca_lit.training.safe_checkpoints import SafeCheckpointIO

        module.load_state_dict(SafeCheckpointIO().load_checkpoint(start.path)["state_dict"])
    if not any(p.requires_grad for p in module.parameters()):  # of the network and of the objectives
        raise ConfigError("model.freeze: nothing is left to train, all parameters are frozen")
    return module


def check_kept(module: "CoCaLit", start: "ResumePoint") -> None:
    """Raises `ConfigError` if an objective means something else than the one that the checkpoint keeps."""
    from coca_lit.weights import OBJECTIVES_KEY

    kept = start.content.get(OBJECTIVES_KEY, {})
    for name, objective in module.objectives.items():
        if name in kept:
            with error_context(f"model.objectives.{name}"):
                cast("Objective", objective).check_resumed(kept[name])


def initialise(cfg: DictConfig, net: "CoCa", source: "DualEncoder | None" = None) -> None:
    """Starts the network from the weights that the config names.

    Args:
        source: the model in `init_from`.
    """
    parts = cfg.init_parts
    if source is None and all(file is None for file in parts.values()):
        return  # as most trainings do, which need not import a dozen modules for this

    from coca_lit.distributed import print_rank_zero
    from coca_lit.weights.lora import PARTS
    from coca_lit.weights.start import copy_weights, load_image_weights

    given: list[str] = []
    if parts.image_encoder is not None and source is not None:
        print_rank_zero(f"init_parts.image_encoder={parts.image_encoder} is not loaded: init_from gives the encoder")
    elif parts.image_encoder is not None:
        with error_context("init_parts.image_encoder"):
            load_image_weights(net, parts.image_encoder)
    if source is not None:
        with error_context("init_from"):
            lora = (cfg.lora.get("parts") or PARTS) if cfg.lora.rank else ()
            given = copy_weights(source, net, cfg.init_from, [lora] if isinstance(lora, str) else lora)
    for name, target in extensions.declared("init_parts").items():
        if parts[name] is not None:
            with error_context(f"init_parts.{name}"):
                extensions.load(target)(net, parts[name], given)


def with_arguments_of(cfg: DictConfig, source: "DualEncoder | Mapping[str, Any]", where: str | Path) -> DictConfig:
    """The config with what the tensors of some weights do not show, such as their CLS mask, taken from them.

    Args:
        source: the model, or the config of one.

    Raises:
        ValueError: the config chooses something else.
    """
    from coca_lit.distributed import print_rank_zero
    from coca_lit.models.config import CoCaConfig
    from coca_lit.models.presets import preset
    from coca_lit.weights.computation import arguments_of, merge

    if cfg.model.net._target_ != "coca_lit.models.create_model":
        return cfg  # a network of the user's own; `copy_weights` compares it with the source
    net = cast(dict[str, Any], OmegaConf.to_container(cfg.model.net, resolve=True))
    of_preset = preset(net["name"])
    merged = merge(net, of_preset, arguments_of(source), str(where))
    without = CoCaConfig().stored() | of_preset | {name: value for name, value in net.items() if value is not None}
    taken = [f"{name}={value}" for name, value in merged.items() if value != without.get(name)]
    if taken:
        print_rank_zero(f"as the weights in {where}: {', '.join(taken)}")
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.model.net = net | merged
    return cfg


def make_module(cfg: DictConfig, model: DictConfig, **objects: Any) -> "CoCaLit":
    """What the node `model` describes, with all that it takes from the data and the trainer of the config."""
    available = {BATCH_SCHEDULE: build_schedule(cfg)}
    return build(model, "model", available, micro_batch_size=cfg.trainer.micro_batch_size, **objects)


def add_adapters(cfg: DictConfig, module: "CoCaLit") -> None:
    """Low-rank adaptation, if `lora.rank` is set: after weights have been loaded, because it renames them. Then it is
    known which batch norms train.
    """
    from coca_lit.distributed import print_rank_zero

    net = module.net
    if cfg.lora.rank:
        adapted = build(cfg.lora, "lora", net=net)
        parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in adapted))
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        print_rank_zero(f"low-rank updates of {len(adapted)} matrices of {parts}, {trained:,} parameters train")
    with error_context("model"):
        module.check_norms()


# What a config leaves open, filled in from the data and the machine


def with_vocabulary(cfg: DictConfig, words: Any = None) -> DictConfig:
    """The config with the words of the training captions as the network's tokenizer, if `vocabulary` is set.

    Args:
        words: of the checkpoint to resume from, or of the model in `init_from`, if it has words; the captions may have
            changed since.

    Raises:
        ConfigError: the network has a tokenizer of its own.
    """
    if cfg.vocabulary is None:
        return cfg
    if cfg.model.net.get("tokenizer") is not None:
        raise ConfigError("vocabulary takes the place of model.net.tokenizer: for the latter set vocabulary=null")
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.model.net.tokenizer = words if isinstance(words, list) else _counted_words(cfg)
    return cfg


def _counted_words(cfg: DictConfig) -> list[str]:
    """The words that occur at least `vocabulary` times in the training captions."""
    from coca_lit.distributed import print_rank_zero
    from coca_lit.tokenizer import frequent_words

    with data_place(cfg):
        data = build(cfg.data, "data", available={"tokenizer": None})
        if not hasattr(data, "training_captions"):
            raise ConfigError(f"vocabulary: {type(data).__name__} has no training_captions(): set vocabulary=null")
        groups = data.training_captions().values()
        questions = [record.question for record in getattr(data, "train_records", ()) if record.question]
    with error_context("vocabulary"):
        captions = (caption for captions in groups for caption in captions)
        words = frequent_words(itertools.chain(captions, questions), cfg.vocabulary)
    print_rank_zero(
        f"vocabulary: {len(words)} words that occur at least {cfg.vocabulary} times in the training captions"
    )
    return words


def with_start(cfg: DictConfig) -> DictConfig:
    """The config of an experiment that trains a model further (`init_from: required`): from random weights if it is but
    a step or two, to check a set-up.

    Raises:
        ConfigError: nobody said which model.
    """
    if cfg.init_from != REQUIRED:
        return cfg
    if not 0 < (cfg.trainer.max_steps or -1) <= SMOKE_STEPS:
        raise ConfigError(
            "this experiment trains a model further: name it, such as init_from=outputs/my_run, or say init_from=null "
            "to start from random weights"
        )
    cfg = cfg.copy()
    cfg.init_from = None
    return cfg


def with_recipe(
    cfg: DictConfig, source: "DualEncoder | None" = None, resumed: bool = False
) -> tuple[DictConfig, list[str]]:
    """The config with plain values for the keys that are "auto", if it names a recipe; and these keys with why, which
    it prints.

    Args:
        source: the model in `init_from`, if any.
        resumed: take the values that the run folder records.
    """
    from coca_lit.distributed import print_rank_zero
    from coca_lit.models import CoCa
    from coca_lit.reading import read_run_yaml
    from coca_lit.runs.run_folder import CONFIG

    if cfg.recipe is None:
        return cfg, []
    cfg = cfg.copy()
    if resumed:
        for key, value in leaves(read_run_yaml(Path(cfg.output_dir), CONFIG)):
            _fill(cfg, key, value)
        return cfg, []
    if source is not None and not isinstance(source, CoCa):
        raise ConfigError(f"init_from: this recipe takes a CoCa, and {cfg.init_from} is a CLIP")
    node = cast(dict[str, Any], OmegaConf.to_container(cfg.data, resolve=True))
    known = {key: value for key, value in node.items() if value != AUTO}
    with data_place(cfg):
        # Of which only the texts are read: batch and size do not matter.
        data = build(OmegaConf.create({"batch_size": 1, **known}), "data", available={"tokenizer": None})
        given = {key: value for key, value in leaves(unresolved(cfg)) if value != AUTO and "${" not in str(value)}
        what, choices = build(cfg.recipe, "recipe")(data, given, source)
    print_rank_zero(f"chosen for {what}; every line is a key:")
    lines: list[str] = []
    for key, value, why in choices:
        if any([_fill(cfg, *leaf) for leaf in leaves(value, key)]):
            shown = "…" if isinstance(value, dict) else written(value)
            lines.append(f"{key}={shown}  # {why}")
            print_rank_zero(f"  {lines[-1]}")
    return cfg, lines


def _fill(cfg: DictConfig, key: str, value: Any) -> bool:
    """Sets a key that is "auto", or an argument of the network that is not given; whether it did."""
    before = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
    if value == AUTO or not (before == AUTO or (before is None and key.startswith("model.net."))):
        return False
    with open_dict(cfg):
        OmegaConf.update(cfg, key, value, force_add=True)
    return True

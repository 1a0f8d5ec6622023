"""From a composed config to the objects of a run, each built from its part of the config.

The constructor is the schema: `build` refuses a key that a constructor does not take and suggests the right one.
"""

import inspect
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf, open_dict

from coca_lit.cli.checks import (
    RENAMED,
    WITHOUT_DATA,
    WITHOUT_EVALUATION,
    check_scalars,
    place_of_data,
    place_of_evaluation,
)
from coca_lit.cli.runtime import best_precision
from coca_lit.errors import ConfigError, DataNotFoundError, check_number, error_context, suggest
from coca_lit.runs.launch import launched_devices, under_srun
from coca_lit.runs.redaction import mask

if TYPE_CHECKING:
    import lightning.pytorch as L

    from coca_lit.callbacks import ScoreDuringTraining
    from coca_lit.data.datamodule import CaptionDataModule
    from coca_lit.evals import Evaluation, Settings
    from coca_lit.lit_module import CoCaLit
    from coca_lit.models import CoCa, DualEncoder
    from coca_lit.tokenizer import Tokenizer

WHEN = ("every_n_epochs", "every_n_steps", "quick")  # keys of `scoring` that the callback takes
NOT_SETTINGS = (*WHEN, "objective", "skip_missing")
HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_")  # that `instantiate` reads itself


def build(node: DictConfig, path: str, offered: Mapping[str, Any] | None = None, **objects: Any) -> Any:
    """Instantiates a config node with Hydra, after checking its keys and values against the signatures of its targets.

    Args:
        path: key of the node, for errors.
        offered: objects that the constructor gets where it has an argument of that name.
        objects: objects that the constructor gets in any case.

    Raises:
        ConfigError: a target that does not exist, a key that its constructor lacks, or a value that it refuses.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    values = OmegaConf.to_container(node, resolve=True)
    if not isinstance(values, dict) or "_target_" not in values:
        raise ConfigError(f"{path} names nothing to build: set {path}._target_ to a class or a function")
    target = resolve_target(values["_target_"], path)
    objects |= {key: value for key, value in (offered or {}).items() if key not in values and _takes(target, key)}
    check_arguments(values, path, objects)
    try:
        return instantiate(node, _convert_="all", **objects)
    except InstantiationException as error:
        cause = error.__cause__
        if not isinstance(cause, TypeError | ValueError | ModuleNotFoundError):
            raise cause or error from error
        raise ConfigError(f"{path}: {cause}") from error


def check_arguments(node: Any, path: str, objects: Iterable[str] = ()) -> None:
    """Checks the keys and values in a node against the signatures of its targets.

    Args:
        node: plain values, resolved.
        path: key of the node, for errors.
        objects: names of further arguments.

    Raises:
        ConfigError: a target that does not exist, a key that its constructor lacks, or a value that it refuses.
    """
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        check_arguments(child, f"{path}.{key}")
    if isinstance(node, dict) and "_target_" in node:
        arguments = _arguments(resolve_target(node["_target_"], path))
        for key in [*node, *objects]:
            if arguments is not None and key not in (*arguments, *HYDRA_KEYS):
                renamed = {old.removeprefix(f"{path}."): new for old, new in RENAMED.items()}
                hint = f"{suggest(key, arguments, renamed)} Its keys: {', '.join(arguments)}"
                raise ConfigError(f"{path} has no key '{key}'{hint}")
        if str(node["_target_"]).startswith("coca_lit."):
            check_scalars(node, argument_defaults({"_target_": node["_target_"]}, path), f"{path}.", own=True)


def resolve_target(target: Any, path: str) -> Callable[..., Any]:
    """The class or function with the full name `target`."""
    try:
        found: Any = pkgutil.resolve_name(str(target))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}: there is no '{target}' ({error})") from error
    if not callable(found) or "." not in target:
        raise ConfigError(f"{path}: '{target}' is a {type(found).__name__}, not a class or a function")
    return found


def _arguments(target: Callable[..., Any]) -> list[str] | None:
    """Names of the arguments of a class or function, including `**kwargs: Unpack[SomeTypedDict]`; None if it takes any
    name.
    """
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:  # it is not written in Python
        return None
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            hint = parameter.annotation
            if isinstance(hint, str):
                function = target.__init__ if inspect.isclass(target) else target
                hint = get_type_hints(function, include_extras=True)[parameter.name]
            if get_origin(hint) is not Unpack:
                return None
            names += get_args(hint)[0].__annotations__
    return names


def has_argument(target: Any, key: str) -> bool:
    """Whether the class or function with this full name takes the argument, or any."""
    try:
        arguments = _arguments(resolve_target(target, key))
    except ConfigError:  # told when it is built
        return False
    return arguments is None or key in arguments


def known_arguments(target: Any) -> list[str]:
    """Names of the arguments of the class or function with this full name."""
    try:
        return _arguments(resolve_target(target, "")) or []
    except ConfigError:
        return []


def argument_defaults(node: dict[str, Any], path: str = "config") -> dict[str, Any]:
    """The defaults of all constructors in a part of a config, by key, as plain values."""
    defaults: dict[str, Any] = {}
    if "_target_" in node:
        with suppress(ValueError):  # it is not written in Python
            parameters = inspect.signature(resolve_target(node["_target_"], path)).parameters.values()
            defaults = {p.name: _plain(p.default) for p in parameters if p.default is not p.empty}
    nested = {key: child for key, child in node.items() if isinstance(child, dict)}
    return defaults | {key: argument_defaults(child, key) for key, child in nested.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


def _takes(target: Callable[..., Any], key: str) -> bool:
    """Whether a class or function has an argument `key`, or may hand it on to a base class that has."""
    classes = inspect.getmro(target) if inspect.isclass(target) else (target,)
    for part in classes:
        with suppress(ValueError):  # it is not written in Python
            if key in (_arguments(part) or inspect.signature(part).parameters):
                return True
    return False


def build_data(cfg: DictConfig, tokenizer: "Tokenizer") -> "CaptionDataModule":
    """The training data, found; raises `DataError` if they are not there."""
    with _named_place(place_of_data(cfg), WITHOUT_DATA):
        data = build(cfg.data, "data", offered={"tokenizer": tokenizer})
        data.prepare_data()
    return data


@contextmanager
def _named_place(key: str | None, otherwise: str) -> Iterator[None]:
    """Adds to the error for missing data the key that names their place, and what runs without them."""
    try:
        yield
    except DataNotFoundError as error:
        place = f"set {key}=PLACE to where they are" if key is not None else ""
        raise DataNotFoundError("; ".join(filter(None, (str(error), place, otherwise)))) from error


def build_module(cfg: DictConfig, checkpoint: Path | None = None) -> "CoCaLit":
    """The LightningModule with its network, started from given weights if there are any.

    Args:
        checkpoint: what the run resumes from; its weights will replace any others.
    """
    source = None
    if checkpoint is not None:
        with error_context("ckpt_path"):
            cfg = with_facts(cfg, _architecture(checkpoint), checkpoint)
    elif cfg.init_from is not None:
        from coca_lit.weights.load import load_dual_encoder

        with error_context("init_from"):
            source = load_dual_encoder(cfg.init_from)
            cfg = with_facts(cfg, source, cfg.init_from)
    optimizer = build(cfg.model.optimizer, "model.optimizer")
    module = make_module(cfg, cfg.model, optimizer=optimizer)
    if checkpoint is None:
        initialise(cfg, module.net, source)
    add_adapters(cfg, module.net)
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

    from coca_lit.weights.load import copy_weights, load_image_weights, load_language_model

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


def _architecture(checkpoint: Path) -> dict[str, Any]:
    """The architecture of a checkpoint, or of another one of its run: the first process may be about to replace the
    link `last.ckpt`, which then points to a damaged file or to none.
    """
    from coca_lit.runs.checkpoint_io import step_files
    from coca_lit.weights.load import read_architecture

    errors = []
    for path in (checkpoint, *step_files(checkpoint.parent)):
        try:
            return read_architecture(path)
        except (OSError, ValueError) as error:
            errors.append(error)
    raise errors[0]


def with_facts(cfg: DictConfig, source: "DualEncoder | Mapping[str, Any]", where: str | Path) -> DictConfig:
    """The config with what the tensors of some weights do not show, such as their CLS mask, taken from them.

    Args:
        source: the model, or the config of one.

    Raises:
        ValueError: the config chooses something else.
    """
    from coca_lit.distributed import print_rank_zero
    from coca_lit.models import CoCa, create_model
    from coca_lit.models.presets import preset
    from coca_lit.weights.computation import arguments_of, merge

    if resolve_target(cfg.model.net._target_, "model.net") is not create_model:
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


def has_objectives(cfg: DictConfig) -> bool:
    """Whether there are further objectives; one that is null is left out."""
    return any(value is not None for value in (cfg.model.get("objectives") or {}).values())


def add_adapters(cfg: DictConfig, net: "CoCa") -> None:
    """Low-rank adaptation, if `lora.rank` is set: after weights have been loaded, because it renames them."""
    from coca_lit.distributed import print_rank_zero

    if not cfg.lora.rank:  # perhaps because its key is misspelt
        check_arguments(OmegaConf.to_container(cfg.lora, resolve=True), "lora")
    else:
        adapted = build(cfg.lora, "lora", net=net)
        parts = dict.fromkeys(name.partition(".")[0] for name in adapted)
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        print_rank_zero(
            f"low-rank updates of {len(adapted)} matrices of {', '.join(parts)}, {trained:,} parameters train"
        )


def with_vocabulary(cfg: DictConfig) -> DictConfig:
    """The config with the words of the training captions as the network's tokenizer, if `vocabulary` is set.
    Checkpoints hold the list.
    """
    from coca_lit.distributed import print_rank_zero
    from coca_lit.tokenizer import frequent_words

    if cfg.vocabulary is None:
        return cfg
    with _named_place(place_of_data(cfg), WITHOUT_DATA):
        groups = build(cfg.data, "data", offered={"tokenizer": None}).training_captions().values()
    with error_context("vocabulary"):
        words = frequent_words((caption for captions in groups for caption in captions), cfg.vocabulary)
    print_rank_zero(
        f"vocabulary: {len(words)} words that occur at least {cfg.vocabulary} times in the training captions"
    )
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.model.net.tokenizer = words
    return cfg


def build_evals(cfg: DictConfig) -> "tuple[list[Evaluation], dict[str, str]]":
    """The evaluations of a config, and with `scoring.skip_missing` the reason for each whose data cannot be read. A
    target may return several evaluations.
    """
    from coca_lit.distributed import print_rank_zero
    from coca_lit.errors import DataError

    evals, missing = [], {}
    for name, node in cfg.evals.items():
        try:
            with _named_place(place_of_evaluation(cfg, name), "" if cfg.scoring.skip_missing else WITHOUT_EVALUATION):
                built = build(node, f"evals.{name}") if node else []
            evals += built if isinstance(built, list) else [built]
        except DataError as error:
            if not cfg.scoring.skip_missing:
                raise
            missing[name] = str(error)
            print_rank_zero(f"skipped {name}: {error}")
    return evals, missing


def build_settings(cfg: DictConfig) -> "Settings":
    """What the evaluations share."""
    import torch

    if (judge := cfg.scoring.get("clip_score_model")) is not None:
        from coca_lit.weights.hub import locate

        with error_context("scoring.clip_score_model"):  # now, and not when training is over
            locate(judge)
    node = _without(cfg.scoring, *NOT_SETTINGS)
    if node.workers is None:
        node.workers = min(4, os.cpu_count() or 1) if torch.cuda.is_available() else 0
    return build(node, "scoring", output_dir=cfg.output_dir)


def build_scoring(cfg: DictConfig, evals: "list[Evaluation]") -> "ScoreDuringTraining":
    """The callback that runs the evaluations during training and at its end."""
    from coca_lit.callbacks import ScoreDuringTraining

    with error_context("scoring"):
        return ScoreDuringTraining(evals, build_settings(cfg), **{key: cfg.scoring[key] for key in WHEN})


def build_trainer(
    cfg: DictConfig, scoring: "ScoreDuringTraining", texts: bool = False, checkpoint: Path | None = None
) -> "L.Trainer":
    """The trainer with its callbacks, `scoring` among them, loggers, strategy and precision.

    Args:
        texts: whether some batches are texts alone.
        checkpoint: from which the run resumes, in its logs too.
    """
    from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from coca_lit.runs.run_folder import resumes
    from coca_lit.training.sharding import check_strategy, set_ddp_options

    for_loggers = {
        "output_dir": cfg.output_dir,
        "resumed_from": checkpoint,
        "same_run": resumes(cfg, checkpoint),
    }
    loggers = [build(node, f"logger.{name}", for_loggers) for name, node in cfg.logger.items() if node]
    callbacks = build_callbacks(cfg, scoring)
    if not loggers:  # the monitor would refuse to train
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    precision = best_precision() if cfg.trainer.precision == "auto" else cfg.trainer.precision
    strategy = cfg.trainer.strategy
    if isinstance(strategy, DictConfig):
        strategy = build(strategy, "trainer.strategy")
    with error_context("trainer"):
        further = {
            "lora": bool(cfg.lora.rank),
            "objectives": has_objectives(cfg),
            "self_critical": cfg.model.get("self_critical") is not None,
        }
        check_strategy(strategy, precision, cfg.ema, cfg.trainer.micro_batch_size, **further)
    parts = {
        "callbacks": callbacks,
        "logger": loggers,
        "precision": precision,
        "strategy": strategy,
        "plugins": build_plugins(),
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),  # no default one
    }
    defaults = {
        "default_root_dir": cfg.output_dir,
        "use_distributed_sampler": False,  # the DataModules split batches over ranks exactly
        "enable_model_summary": False,  # there is `RunSummary`
        "num_sanity_val_steps": 0,
    }
    node = _without(cfg.trainer, "micro_batch_size")  # an argument of the module
    try:
        trainer: L.Trainer = build(node, "trainer", defaults, **parts)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error
    with error_context("trainer"):
        check_number("accumulate_grad_batches", trainer.accumulate_grad_batches, whole=True, at_least=1)
    accumulates, micro_batches = trainer.accumulate_grad_batches > 1, cfg.trainer.micro_batch_size is not None
    varies = accumulates or micro_batches or further["objectives"] or further["self_critical"]
    set_ddp_options(trainer.strategy, texts, same_graph=not varies)
    return trainer


def build_callbacks(cfg: DictConfig, scoring: "ScoreDuringTraining") -> "list[L.Callback]":
    """In the order in which they must act. Averaged weights replace the trained ones when training ends: after the
    last checkpoint, before the final scores.
    """
    from coca_lit.callbacks import Averaging, Checkpoints, LogRunFacts, RunSummary, SamplesSeen, SourceCounts
    from coca_lit.runs.resume import resume_keys

    # The config as a function: in a dictionary Hydra would build the targets.
    offered = {"output_dir": cfg.output_dir, "run_config": lambda: resume_keys(plain(cfg))}
    callbacks = [build(node, f"callbacks.{name}", offered) for name, node in cfg.callbacks.items() if node]
    checkpoints = [callback for callback in callbacks if isinstance(callback, Checkpoints)]
    others = [callback for callback in callbacks if callback not in checkpoints]
    with error_context("ema"):
        averaging = [Averaging(decay=cfg.ema)] if cfg.ema is not None else []
    facts = LogRunFacts(partial(plain, cfg, resolve=True))
    always = [SamplesSeen(), SourceCounts(), facts, RunSummary(cfg.output_dir)]
    return [*checkpoints, *averaging, scoring, *others, *always]


def build_plugins() -> list[Any]:
    """Safe checkpoint files, and under srun an environment that leaves requeueing to us: Lightning would save within
    the signal handler, in the middle of a step.
    """
    from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    from coca_lit.training.checkpoint_plugin import SafeCheckpointIO

    if not under_srun() or TorchElasticEnvironment.detect():
        return [SafeCheckpointIO()]
    # `srun --ntasks=2` sets no number per node, without which Lightning refuses to start.
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launched_devices()))
    return [SafeCheckpointIO(), SLURMEnvironment(auto_requeue=False)]


def _without(node: DictConfig, *keys: str) -> DictConfig:
    """A copy of the node, open for further keys, without those that are not for its target."""
    copy = node.copy()
    OmegaConf.set_struct(copy, False)
    for key in keys:
        copy.pop(key, None)
    return copy


def plain(cfg: DictConfig, resolve: bool = False) -> dict[str, Any]:
    """A config as plain values without its secrets. Without `resolve`, interpolations are left as they stand."""
    return cast(dict[str, Any], mask(OmegaConf.to_container(cfg, resolve=resolve)))

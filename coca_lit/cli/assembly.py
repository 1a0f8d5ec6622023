"""From a composed config to the objects of a run, each built from its part of the config."""

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from coca_lit import extensions
from coca_lit.cli.allowed import check_targets
from coca_lit.cli.runtime import best_precision
from coca_lit.cli.schema import AUTO, BATCH_SCHEDULE, BUILD_KEYS, read_signature, unresolved
from coca_lit.errors import ConfigError, DataError, DataNotFoundError, error_context
from coca_lit.machine import best_device, processors
from coca_lit.runs.redaction import mask

if TYPE_CHECKING:
    import lightning.pytorch as L

    from coca_lit.callbacks import ScoreDuringTraining
    from coca_lit.data.batch_schedule import BatchSchedule
    from coca_lit.data.datamodule import CaptionDataModule
    from coca_lit.evals import Evaluation, Settings
    from coca_lit.runs.resume import ResumePoint
    from coca_lit.tokenizer import Tokenizer

WHEN = ("every_n_epochs", "every_n_steps", "quick")  # keys of `scoring` that the callback takes
NOT_SETTINGS = (*WHEN, "objective", "skip_missing")
FUNCTIONS = ("objectives", "measures")  # arguments that hold functions by name, which are called later
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def build(node: DictConfig, path: str, available: Mapping[str, Any] | None = None, **objects: Any) -> Any:
    """Builds what a config node names, as Hydra's `instantiate` would.

    Args:
        path: key of the node, for errors.
        available: objects that the constructor gets where it has an argument of that name.
        objects: objects that the constructor gets in any case.

    Raises:
        ConfigError: a target that does not exist or may not run, or a key or value that its constructor refuses.
    """
    values = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    if not isinstance(values, dict) or "_target_" not in values:
        raise ConfigError(f"{path} names nothing to build: set {path}._target_ to a class or a function")
    resolve_target(values["_target_"], path)
    taken = read_signature(values["_target_"]).arguments
    if BATCH_SCHEDULE in taken:
        others = extensions.schedule_keys(path).keys() - taken.keys()  # arguments of the schedule alone
        values = {key: value for key, value in values.items() if key not in others}
    objects |= {key: value for key, value in (available or {}).items() if key not in values and key in taken}
    for key in FUNCTIONS:  # `_partial_` keeps those that await arguments
        for name, part in (values.get(key) or {}).items():
            if isinstance(part, dict) and "_target_" in part and _awaits_arguments(part, f"{path}.{key}.{name}"):
                part["_partial_"] = True
    try:
        return _built(values, path, **objects)
    except (TypeError, ValueError, ModuleNotFoundError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _built(value: Any, path: str, **objects: Any) -> Any:
    """A value, with what its `_target_`s name built from the inside out. What Hydra 1.4 itself makes of `_partial_`
    cannot be sent to the processes of data workers.
    """
    if isinstance(value, list):
        return [_built(part, f"{path}.{i}") for i, part in enumerate(value)]
    if not isinstance(value, dict):
        return value
    parts = {key: _built(part, f"{path}.{key}") for key, part in value.items()} | objects
    if "_target_" not in parts:
        return parts
    target = resolve_target(parts["_target_"], path)
    arguments = {key: part for key, part in parts.items() if key not in BUILD_KEYS}
    function = partial(target, *parts.get("_args_", ()), **arguments)
    return function if parts.get("_partial_") else function()


def resolve_target(target: Any, path: str) -> Callable[..., Any]:
    """The class or function with the full name `target`, which may be run, see `coca_lit.cli.allowed`."""
    check_targets([str(target)])
    try:
        found: Any = pkgutil.resolve_name(str(target))
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{path}: there is no '{target}' ({error}){extensions.where_to_get(str(target))}") from error
    if not callable(found) or "." not in target:
        raise ConfigError(f"{path}: '{target}' is a {type(found).__name__}, not a class or a function")
    return found


def _awaits_arguments(node: Mapping[str, Any], path: str) -> bool:
    """Whether the target is a function that takes more than the node gives."""
    target = resolve_target(node["_target_"], path)
    parameters = inspect.signature(target).parameters.values() if inspect.isfunction(target) else ()
    return any(p.default is p.empty and p.name not in node and p.kind not in VARIABLE for p in parameters)


def build_data(cfg: DictConfig, tokenizer: "Tokenizer") -> "CaptionDataModule":
    """The training data, found; raises `DataError` if they are not there."""
    from coca_lit.data.datamodule import CaptionDataModule

    available = {"tokenizer": tokenizer, BATCH_SCHEDULE: build_schedule(cfg)}
    with data_place(cfg):
        data = build(cfg.data, "data", available)
        if isinstance(data, CaptionDataModule):  # one of your own downloads in one process of a machine, by Lightning
            data.prepare_data()
    return data


def build_schedule(cfg: DictConfig) -> "BatchSchedule | None":
    """What gives batches of another source, a new object in each call: `data.batch_schedule`, or what a key of the data
    asks for that a project declares; None if there is none.
    """
    if BATCH_SCHEDULE not in read_signature(cfg.data.get("_target_")).arguments:  # of a DataModule of your own
        return None
    for name, declared in extensions.batch_schedules().items():
        if cfg.data.get(name) is None:
            continue
        arguments: dict[str, Any] = {}
        for key in (f"data.{name}", *declared.keys):
            value = OmegaConf.select(cfg, key)
            if value is not None:
                arguments[key.rpartition(".")[2]] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
        with error_context(f"data.{name}"):
            schedule: BatchSchedule = extensions.load(declared.schedule)(**arguments)
        return schedule
    node = cfg.data.get(BATCH_SCHEDULE)
    return build(node, f"data.{BATCH_SCHEDULE}") if node is not None else None


@contextmanager
def _named_place(key: str, otherwise: str) -> Iterator[None]:
    """Adds to the error for missing data the key that names their place, and what runs without them."""
    try:
        yield
    except DataNotFoundError as error:
        place = f"set {key}=PLACE to where they are" if key else ""
        raise DataNotFoundError("; ".join(filter(None, (str(error), place, otherwise)))) from error


def data_place(cfg: DictConfig) -> AbstractContextManager[None]:
    """`_named_place` of the training data."""
    key = next((f"data.{key}" for key in ("root", "shards") if key in cfg.data), "")
    return _named_place(key, "data=scenes needs no files")


def _place_of_evaluation(cfg: DictConfig, name: str) -> str:
    """The keys that say where the data of an evaluation are; none if they need no files."""
    evaluation = unresolved(cfg.evals)[name] or {}
    parts = {f"{name}.{part}": evaluation.get(part) for part in ("records", "images", "training", "positives")}
    keys: dict[str, None] = {}
    for path, node in {name: evaluation, **parts}.items():
        places = {key: node.get(key) for key in ("root", "shards", "images")} if isinstance(node, dict) else {}
        for key, place in places.items():
            if place is None or isinstance(place, dict):
                continue
            found = re.search(r"\$\{roots\.(\w+)\}", str(place))
            if found:
                follows = unresolved(cfg.roots)[found[1]] == "${data.root}"
                keys["data.root" if follows else f"roots.{found[1]}"] = None
            elif key != "images":  # which may be named relative to the root
                keys[f"evals.{path}.{key}"] = None
    return " or ".join(keys)


def build_evals(cfg: DictConfig) -> "tuple[list[Evaluation], dict[str, str]]":
    """The evaluations of a config, and with `scoring.skip_missing` the reason for each whose data cannot be read, or
    whose scores have the names of another's. A target may return several evaluations, or be a function
    (model, records, settings) -> {score: value} itself.

    Raises:
        ConfigError: two evaluations give a score of the same name, as far as it is known beforehand.
    """
    from coca_lit.distributed import print_rank_zero

    evals: list[Evaluation] = []
    missing: dict[str, str] = {}
    givers: dict[str, str] = {}  # score -> key of its evaluation
    for name, node in cfg.evals.items():
        try:
            otherwise = "scoring.skip_missing=true leaves such evaluations out, evals=[] all of them"
            with _named_place(_place_of_evaluation(cfg, name), "" if cfg.scoring.skip_missing else otherwise):
                built = _build_evaluation(name, node) if node else []
        except DataError as error:
            if not cfg.scoring.skip_missing:
                raise
            missing[name] = str(error)
            print_rank_zero(f"skipped {name}: {error}")
            continue
        for evaluation in built if isinstance(built, list) else [built]:
            scores = [f"{evaluation.name}/{of}" for of in evaluation.score_names or [type(evaluation).__name__]]
            twice = next((score for score in scores if score in givers), None)
            if twice:
                clash = f"evals.{givers[twice]} and evals.{name} both give {twice}: set evals.NAME.name=… of one"
                if not cfg.scoring.skip_missing:
                    raise ConfigError(clash)
                missing[f"{name} {evaluation.name}"] = clash
                print_rank_zero(f"skipped {evaluation.name} of {name}: {clash}")
                continue
            givers |= dict.fromkeys(scores, name)
            evals.append(evaluation)
    return evals, missing


def _build_evaluation(name: str, node: DictConfig) -> "Evaluation | list[Evaluation]":
    path = f"evals.{name}"
    if "_target_" not in node or not _awaits_arguments(node, path):
        return build(node, path, available={"name": name})

    from coca_lit.evals import FunctionEvaluation

    given = build(_without(node, "every"), path, _partial_=True).keywords
    if "records" not in given:
        raise ConfigError(f"{path} has nothing to score: set {path}.records._target_ to what returns records")
    records = given.pop("records")
    function = partial(resolve_target(node["_target_"], path), **given)
    with error_context(path):
        return FunctionEvaluation(name, records, function, node.get("every", 1))


def build_settings(cfg: DictConfig) -> "Settings":
    """What the evaluations share."""
    judge = cfg.scoring.get("clip_score_model")
    if judge is not None:
        from coca_lit.weights.hub import locate

        with error_context("scoring.clip_score_model"):  # now, and not when training is over
            locate(judge)
    node = _without(cfg.scoring, *NOT_SETTINGS)
    if node.workers is None:
        node.workers = min(4, processors()) if best_device() == "cuda" else 0  # macOS starts workers slowly
    return build(node, "scoring", output_dir=cfg.output_dir)


def build_scoring(cfg: DictConfig, evals: "list[Evaluation]") -> "ScoreDuringTraining":
    """The callback that runs the evaluations during training and at its end."""
    from coca_lit.callbacks import ScoreDuringTraining

    with error_context("scoring"):
        return ScoreDuringTraining(evals, build_settings(cfg), **{key: cfg.scoring[key] for key in WHEN})


def build_trainer(
    cfg: DictConfig, scoring: "ScoreDuringTraining", start: "ResumePoint | None" = None, splits: bool = True
) -> "L.Trainer":
    """The trainer with its callbacks, `scoring` among them, loggers, strategy and precision.

    Args:
        start: from which the run resumes, in its logs too.
        splits: the data split their batches over ranks, as ours do exactly; else Lightning gives each rank its samples.

    Raises:
        ConfigError: a setting is wrong, or the length is none or less than what `start` has been trained.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from coca_lit.callbacks import in_order
    from coca_lit.runs.resume import identity_of, is_same_run
    from coca_lit.training.lightning_fixes import begun_epochs
    from coca_lit.training.trainer import trainer_parts

    logged = start.run.get("logged_steps", 0) if start is not None else 0
    available = {"output_dir": cfg.output_dir, "logged_steps": logged, "same_run": is_same_run(cfg, start)}
    loggers = [build(node, f"logger.{name}", available) for name, node in cfg.logger.items() if node]
    # The config as a function: in a dictionary Hydra would build the targets.
    available = {"output_dir": cfg.output_dir, "identity": lambda: identity_of(plain(cfg))}
    chosen = [build(node, f"callbacks.{name}", available) for name, node in cfg.callbacks.items() if node]
    with error_context("ema"):
        config = partial(plain, cfg, resolve=True)
        callbacks = in_order(chosen, scoring, cfg.ema, cfg.output_dir, config, resumes=start is not None)
    strategy = cfg.trainer.strategy
    if isinstance(strategy, DictConfig):
        strategy = build(strategy, "trainer.strategy")
    accelerator = cfg.trainer.get("accelerator", "auto")
    precision = cfg.trainer.precision
    if precision == AUTO:
        precision = best_precision("cpu" if accelerator == "cpu" else best_device())
    parts = trainer_parts(callbacks, loggers, accelerator, strategy, precision)
    node = _without(cfg.trainer, "micro_batch_size")  # an argument of the module
    if node.get("max_steps") is None:
        node.max_steps = -1  # Lightning's word for no limit
    defaults = {"default_root_dir": cfg.output_dir, "use_distributed_sampler": not splits, "num_sanity_val_steps": 0}
    defaults["enable_model_summary"] = False  # there is `RunSummary`
    try:
        trainer: L.Trainer = build(node, "trainer", defaults, **parts)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error
    if start is not None and start.run:
        done = {"max_steps": start.run["step"], "max_epochs": begun_epochs(start.content)}
        for limit, count in done.items():
            length = getattr(trainer, limit)
            if length is not None and 0 <= length < count:
                raise ConfigError(
                    f"trainer.{limit}={length}: {start.path} has {count} {limit[4:]} already; raise it, take another "
                    "name, or set ckpt_path to an earlier checkpoint"
                )
    return trainer


def _without(node: DictConfig, *keys: str) -> DictConfig:
    """A copy of the node, open for further keys, without those that are not for its target."""
    copy = node.copy()
    OmegaConf.set_struct(copy, False)
    for key in keys:
        copy.pop(key, None)
    return copy


def plain(cfg: DictConfig, resolve: bool = False) -> dict[str, Any]:
    """A config as plain values without its secrets. Without `resolve`, interpolations are left as they stand."""
    return mask(OmegaConf.to_container(cfg, resolve=resolve))

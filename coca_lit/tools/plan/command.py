"""What a training run needs, before it is started: `coca-plan experiment=pretrain_b32 'gpus=[H100]' devices=64`."""

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from coca_lit import extensions
from coca_lit.cli.command import command
from coca_lit.cli.module import add_adapters, load_source, make_module, with_recipe, with_vocabulary
from coca_lit.errors import ConfigError, DataNotFoundError, check_number, error_context

if TYPE_CHECKING:
    from coca_lit.data.inputs import ImageReader
    from coca_lit.lit_module import CoCaLit
    from coca_lit.tools.plan.estimate import Model, Recipe, Settings
    from coca_lit.tools.plan.trace import Cost

AUTOCAST = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}
DEVICES, LEAST = 8, 16  # GPUs of a machine if nothing says how many; fewer if one would get less than 16 pairs
PRECISIONS = (*AUTOCAST, "bf16-true", "16-true", "32-true", "64-true")


def plan() -> None:
    """Entry point of `coca-plan`."""
    command("plan", run)


def run(cfg: DictConfig) -> None:
    """Prints the plan of a run. No weights are allocated and no folder is made; data are read only by a recipe or for
    `vocabulary`.

    Raises:
        ConfigError: a setting of the plan, or the model, cannot be used.
    """
    from coca_lit.tools.plan.estimate import print_plan

    settings = read_settings(cfg)
    source = load_source(cfg) if cfg.recipe is not None else None
    if cfg.recipe is not None:  # whose choices depend on the data
        cfg, _ = with_recipe(cfg, source)
        source = source or load_source(cfg)
    try:
        cfg = with_vocabulary(cfg, source.tokenizer.spec if source is not None else None)
    except DataNotFoundError:
        print("vocabulary: the training captions are not there, so the tokenizer of the preset is counted.")
    module = build_without_weights(cfg)
    model, spent, recipe = estimate(cfg, settings, module)
    pixels = 3 * cfg.image_size**2 * math.prod(reader_of(cfg).leading)
    print_plan(f"{cfg.model.net.name}, {cfg.trainer.precision}", model, spent, recipe, settings, pixels)
    left_out = [objective.config_key for objective in module.configured_objectives if not objective.is_counted]
    if left_out:
        print(f"Not counted, so the run needs more: {' and '.join(left_out)}.")
    if source is None and cfg.init_from not in (None, "required"):
        print(f"Of the preset, not of init_from={cfg.init_from}: image encoder, pooler and vocabulary.")
    if module.batch_schedule is not None:
        keys = " and ".join(objective.config_key for objective in module.batch_schedule.objectives)
        print(f"Not counted: {keys}, whose batches are steps of their own.")


def estimate(cfg: DictConfig, settings: "Settings", module: "CoCaLit") -> "tuple[Model, Cost, Recipe]":
    """Model, cost and recipe of a run, for the functions of `coca_lit.tools.plan.estimate`.

    Args:
        module: without weights.

    Raises:
        ConfigError: the data or the trainer cannot be used, captions are longer than the model's context, or no loss
            can be counted.
    """
    import torch
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    from coca_lit.tools.plan.estimate import measure
    from coca_lit.tools.plan.trace import cost, on_gpu
    from coca_lit.training.objectives import check_caption_count

    tokens = settings.caption_tokens
    with error_context("caption_tokens"):
        check_number("the mean length of captions", tokens, at_most=module.net.config.context_length)
    weights = module.loss_weights
    objectives = [objective for objective in module.configured_objectives if objective.is_counted]
    if not any(weights.values()) and not objectives:
        raise ConfigError(
            "no loss of this run can be counted: an objective whose `needs` name what it reads of the forward pass can"
        )
    precision = read_precision(cfg)
    autocast = AUTOCAST.get(precision)
    captions = cfg.data.get("captions", 1)
    check_caption_count(module.every_objective, captions)
    if precision.endswith("-true") and precision.startswith(("bf16", "16")):
        module.net.to(torch.bfloat16)
    model = measure(module.net, objectives)
    half = not precision.startswith(("32", "64"))
    mixed = getattr(torch, autocast) if autocast else None
    try:
        spent = cost(module.net, weights, tokens, mixed, objectives, reader_of(cfg), captions)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(
            f"a plan has no values of tensors, and something reads them ({error}); an objective that does sets "
            "is_counted = False"
        ) from error
    spent = on_gpu(module.net, spent, tokens, 2 if half else 4)
    return model, spent, read_recipe(cfg, settings, weights, half)


def reader_of(cfg: DictConfig) -> "ImageReader":
    """Of the kind of input that is trained on: images, unless the data have an option of another kind."""
    from coca_lit.data.inputs import chosen_reader

    options: dict[str, Any] = {}
    for name in extensions.input_options():
        found = [OmegaConf.select(cfg, key) for key in (f"data.{name}", f"data.records.{name}")]
        options[name] = next(filter(None, found), None)
    return chosen_reader(options)


def read_precision(cfg: DictConfig) -> str:
    """The precision by its full name; `auto` is that of a GPU.

    Raises:
        ConfigError: a precision that a plan does not know.
    """
    given = cfg.trainer.precision
    precision = "bf16-mixed" if given == "auto" else full_precision_name(given)
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision must be auto or one of {', '.join(PRECISIONS)}, got '{given}'")
    return precision


def full_precision_name(precision: str | int | None) -> str:
    """Lightning's full name of a precision, which it also takes as a number or a short name: 16 -> "16-mixed"."""
    short = {"64": "64-true", "32": "32-true", "None": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    return short.get(str(precision), str(precision))


def read_settings(cfg: DictConfig) -> "Settings":
    """What the command asks for besides the run.

    Raises:
        ConfigError: a setting that cannot be used.
    """
    from coca_lit.tools.plan.estimate import Settings

    try:
        return Settings(**{key: OmegaConf.select(cfg, key) for key in inspect.signature(Settings).parameters})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_without_weights(cfg: DictConfig) -> "CoCaLit":
    """The module of a run, its tensors without memory."""
    import torch

    from coca_lit.models.init import Uninitialised

    node = cfg.model.copy()
    with open_dict(node):
        node.compile = False  # the same work, and nothing to compile
    OmegaConf.resolve(node)
    try:
        with torch.device("meta"), Uninitialised():
            module = make_module(cfg, node)
            add_adapters(cfg, module)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        if "meta" not in str(error):
            raise
        raise ConfigError(
            f"a part of the model reads values of tensors when it is built ({error}), and a plan has none: build them "
            'with device="cpu"'
        ) from error
    return module


def read_recipe(cfg: DictConfig, settings: "Settings", weights: Mapping[str, float], half: bool) -> "Recipe":
    """How the run trains: batch, devices, precision, samples."""
    from coca_lit.tools.plan.estimate import Recipe

    trainer = cfg.trainer
    fitting = min(max(cfg.data.batch_size // (LEAST * trainer.num_nodes), 1), DEVICES)
    given = isinstance(trainer.devices, int) and trainer.devices > 0  # -1: all that there are
    devices = settings.devices or trainer.num_nodes * (trainer.devices if given else fitting)
    samples = settings.samples
    epoch = cfg.data.get("epoch_samples")
    limits: list[float] = []  # the first one that is reached ends the run
    if (trainer.max_steps or -1) > 0:
        limits.append(trainer.max_steps * cfg.data.batch_size * trainer.accumulate_grad_batches)
    if epoch is not None and (trainer.max_epochs or -1) > 0:
        limits.append(trainer.max_epochs * epoch)
    if samples is None and limits:
        samples = min(limits)
    strategy = trainer.strategy
    return Recipe(
        batch=cfg.data.batch_size,
        devices=devices,
        contrastive=bool(weights["contrastive"]),
        sharded=isinstance(strategy, DictConfig) and str(strategy.get("_target_", "")).endswith("FullySharded"),
        averaged=cfg.ema is not None,
        micro_batch=trainer.micro_batch_size,
        half=half,
        samples=samples,
    )

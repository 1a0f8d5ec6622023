"""Captions from the command line: `coca-caption IMAGE_OR_FOLDER_OR_SHARDS…`.

Under torchrun the work is split over the processes; shards also go to GPUs and clusters (`engine=`). The result is the
same.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig

from coca_lit import extensions
from coca_lit.cli.assembly import build
from coca_lit.cli.command import command, register_resolver
from coca_lit.cli.runtime import chosen_dtype, configure_libraries
from coca_lit.errors import ConfigError, DataError, error_context
from coca_lit.machine import processors, workers_start_at_once
from coca_lit.models.generation.options import OPTIONS, complete, describe
from coca_lit.runs.run_folder import in_use
from coca_lit.tools.checkpoint import chosen_checkpoint
from coca_lit.tools.claims import claim
from coca_lit.tools.engines import Engine, Machine, Work

if TYPE_CHECKING:
    import torch

    from coca_lit.models import CoCa
    from coca_lit.tools.caption.captioner import Totals
    from coca_lit.tools.caption.inputs import Unit


DEFAULTS = {"strategy": "beam"}  # where commands differ from `CoCa.generate`


def generate_help() -> str:
    """A line for each option of `generate`, for `coca-caption --help`."""
    names = [name for name, option in OPTIONS.items() if option.key]
    return "\n".join(f"    {name:20}{describe(name, DEFAULTS.get(name))}" for name in names)


# The keys of `generate`, for Hydra; None stands for the default of `CoCa.generate`.
ConfigStore.instance().store(
    "generate_schema", {"generate": {name: None for name, option in OPTIONS.items() if option.key}}
)
register_resolver("generate_help", generate_help)


def caption() -> None:
    """Entry point of `coca-caption` and `python -m coca_lit.tools.caption`."""
    command("caption", run, positional="images")


def run(cfg: DictConfig) -> None:
    """Captions as configured."""
    from coca_lit.distributed import process_group, rank
    from coca_lit.tools.caption.captioner import caption_units
    from coca_lit.tools.caption.inputs import find_inputs
    from coca_lit.tools.caption.outputs import open_writer

    configure_libraries(cfg.threads)
    if cfg.output is not None:
        cfg.output = str(cfg.output)  # a name like 2024 comes as a number
    words = cfg.images if isinstance(cfg.images, ListConfig) else [cfg.images]
    units = find_inputs([str(word) for word in words], cfg.batch_size, input_options_of(cfg))
    engine = build(cfg.engine, "engine")
    if not (isinstance(engine, Machine) and engine.devices is None):
        return _run_on(engine, cfg, units)
    guard: AbstractContextManager[None] = nullcontext()
    if cfg.output and cfg.output.endswith((".json", ".jsonl")):  # a second command would append to the same file
        path = Path(cfg.output)
        guard = in_use(path.with_name(f".{path.name}.in-use"), cfg.output)
    # Processes wait for each other only at the very end.
    with guard, process_group(timeout=timedelta(days=7)) as device:
        _choose_precision(cfg)
        model, digest = _load(chosen_checkpoint(cfg.checkpoint), cfg.precision, device)
        options = _options(cfg, model)
        if rank() == 0:
            print(f"generate: {as_run(options)}", file=sys.stderr)
        workers = decoders(cfg.num_workers)
        writer = open_writer(cfg.output, units, _settings(cfg, digest))
        totals = caption_units(model, units, writer, options, cfg.batch_size, workers, cfg.seed)
        if rank() == 0:
            print(totals, file=sys.stderr)
        _check_whole(totals)


def as_run(options: Mapping[str, Any]) -> str:
    """The options as generation will use them, such as "strategy=beam num_beams=2 length_penalty=1.0": those of the
    strategy, and others that differ from their defaults.
    """
    words = []
    chosen = complete(options)
    for name, value in vars(chosen).items():
        option = OPTIONS[name]
        of_strategy = name == "strategy" or option.strategy == chosen.strategy
        if value is not None and option.key and (value != option.default or of_strategy):
            words.append(f"{name}={value}")
    return " ".join(words)


def _run_on(engine: Engine, cfg: DictConfig, units: "Sequence[Unit]") -> None:
    """New captions for shards, on an engine."""
    from coca_lit.tools.caption.captioner import total
    from coca_lit.tools.caption.outputs import open_writer

    shards = [unit for unit in units if isinstance(unit, Path)]
    if not cfg.output or cfg.output.endswith((".json", ".jsonl")) or len(shards) < len(units):
        raise ConfigError("an engine recaptions shards: give .tar files and output=FOLDER/, or set engine=local")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("an engine starts its own processes: run the command without torchrun, or set engine=local")
    cfg.checkpoint = chosen_checkpoint(cfg.checkpoint)
    start = time.monotonic()
    _choose_precision(cfg)
    model, digest = _load(cfg.checkpoint, "fp32", "cpu")  # what is wrong is told here, before any job starts
    print(f"generate: {as_run(_options(cfg, model))}", file=sys.stderr)
    writer = open_writer(cfg.output, units, _settings(cfg, digest))
    del model
    work = Work(engine, "captioning")
    todo = [shard for shard in shards if not writer.has_unit(shard)]
    totals = total([*work(caption_shard, todo, cfg)])
    if totals.seconds:
        print(totals._replace(seconds=time.monotonic() - start), file=sys.stderr)
    work.close(len(units))
    _check_whole(totals)


def _check_whole(totals: "Totals") -> None:
    """Raises `DataError` if a part of a shard is lost."""
    if totals.torn:
        raise DataError(f"shards that are broken or truncated: {totals.torn}; what can be read of them is captioned")


def caption_shard(path: Path, cfg: DictConfig) -> "Totals":
    """New captions for one shard, in whatever process. It keeps its model for the next shard."""
    from coca_lit.distributed import process_group
    from coca_lit.models.registry import import_modules
    from coca_lit.runs.launch import import_from_current_folder
    from coca_lit.tools.caption.captioner import caption_units
    from coca_lit.tools.caption.outputs import SETTINGS, Recaptioned

    import_from_current_folder(cfg.imports)  # again, as a process that is spawned knows nothing of the first one's
    import_modules(cfg.imports)
    configure_libraries(cfg.threads)
    with process_group() as device:
        model, digest = _loaded(cfg.checkpoint, cfg.precision, device)
        claim(Path(cfg.output) / SETTINGS, _settings(cfg, digest), taken=True)  # the checkpoint may have changed since
        writer = Recaptioned(Path(cfg.output), [path])
        options = _options(cfg, model)
        workers = decoders(cfg.num_workers)
        return caption_units(model, [path], writer, options, cfg.batch_size, workers, cfg.seed)


def _choose_precision(cfg: DictConfig) -> None:
    """Decides what `auto` is, once for all jobs and for the settings of the output."""
    import torch

    cfg.precision = "bf16" if chosen_dtype(cfg.precision) is torch.bfloat16 else "fp32"


def _load(checkpoint: str, precision: str, device: "torch.device | str") -> "tuple[CoCa, str]":
    """The model on a device, and the digest of its weights in the file."""
    from coca_lit.weights.computation import fingerprint
    from coca_lit.weights.load import load_model

    dtype = chosen_dtype(precision)
    with error_context("checkpoint"):
        model = load_model(checkpoint)
    if model.decoder is None:
        raise ConfigError("checkpoint: this model was built for retrieval only, it has no decoder to caption with")
    digest = fingerprint(model)
    return model.to(device, dtype), digest


_loaded = lru_cache(maxsize=1)(_load)


def _options(cfg: DictConfig, model: "CoCa") -> dict[str, Any]:
    """Of `CoCa.generate`; raises `ConfigError` for wrong ones, before any image is read."""
    from coca_lit.models.generation.state import check_options

    options = _given(cfg)
    with error_context("generate"):
        if not isinstance(options.get("prompt", ""), str):
            raise ValueError(f"prompt must be one text, with which every caption begins, got {options['prompt']}")
        check_options(model, options)
    return options


def _given(cfg: DictConfig) -> dict[str, Any]:
    """The options of `generate` that are not null, with the strategy of commands where no other is asked for."""
    options = {str(key): value for key, value in cfg.generate.items() if value is not None}
    return options if options.keys() & {"strategy", "preset"} else DEFAULTS | options


def _settings(cfg: DictConfig, digest: str) -> dict[str, Any]:
    """What a result depends on."""
    given = _given(cfg)
    settings = {"model": digest, "precision": cfg.precision, "seed": cfg.seed}
    settings |= input_options_of(cfg)
    if complete(given).strategy == "sample":  # which is seeded by batch
        settings["batch_size"] = cfg.batch_size
    return settings | {f"generate.{key}": value for key, value in given.items()}


def input_options_of(cfg: DictConfig) -> dict[str, Any]:
    """The options of other kinds of input than images, by name."""
    return {name: cfg[name] for name in extensions.input_options()}


def decoders(num_workers: int | None) -> int:
    """Processes that decode images; for None up to 4, none where each would import PyTorch."""
    if num_workers is None:
        return min(4, processors()) if workers_start_at_once() else 0
    if not isinstance(num_workers, int) or num_workers < 0:
        raise ConfigError(f"num_workers must be a whole number of at least 0, got {num_workers!r}")
    return num_workers

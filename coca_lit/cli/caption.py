"""Captions from the command line: `coca-caption IMAGE_OR_FOLDER_OR_SHARDS…`.

Under torchrun the work is split over the processes; the result is the same.
"""

import os
import sys
from datetime import timedelta
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from coca_lit.cli.command import command
from coca_lit.cli.runtime import best_precision, chosen_checkpoint, configure_libraries
from coca_lit.errors import ConfigError, error_context
from coca_lit.models.generation.options import OPTIONS, describe


def generate_help() -> str:
    """A line for each option of `generate`, for `coca-caption --help`."""
    return "\n".join(f"    {name:20}{describe(name)}" for name, option in OPTIONS.items() if option.key)


# The keys of `generate`, for Hydra; None stands for the default of `CoCa.generate`.
ConfigStore.instance().store(
    "generate_schema", {"generate": {name: None for name, option in OPTIONS.items() if option.key}}
)
OmegaConf.register_new_resolver("generate_help", generate_help, replace=True)


def caption() -> None:
    """Entry point of `coca-caption` and `python -m coca_lit.cli.caption`."""
    command("caption", run, positional="images")


def run(cfg: DictConfig) -> None:
    """Captions as configured."""
    import torch

    from coca_lit.distributed import process_group, rank
    from coca_lit.inference.caption import caption
    from coca_lit.inference.inputs import find_inputs
    from coca_lit.inference.outputs import open_writer
    from coca_lit.weights.digest import fingerprint
    from coca_lit.weights.load import load_model

    configure_libraries(cfg.threads)
    units = find_inputs([str(word) for word in cfg.images], cfg.batch_size)
    options = {str(key): value for key, value in cfg.generate.items() if value is not None}
    bf16 = _bf16(cfg.precision)
    with process_group(timeout=timedelta(days=7)) as device:  # processes wait for each other only at the very end
        with error_context("checkpoint"):
            model = load_model(chosen_checkpoint(cfg.checkpoint))
        if model.decoder is None:
            raise ConfigError("checkpoint: this model was built for retrieval only, it has no decoder to caption with")
        settings = {"model": fingerprint(model), "seed": cfg.seed}
        settings |= {f"generate.{key}": value for key, value in options.items()}
        model = model.to(device, torch.bfloat16 if bf16 else None)
        with error_context("generate"):  # options that exclude each other fail now, and not after the first images
            model.generate(torch.zeros(1, 3, model.image_size, model.image_size, dtype=torch.uint8), **options)
        writer = open_writer(cfg.output, units, settings)
        totals = caption(model, units, writer, options, cfg.batch_size, decoders(cfg.num_workers), cfg.seed)
        if rank() == 0:
            print(totals, file=sys.stderr)


def decoders(num_workers: int | None) -> int:
    """Processes that decode images; up to 4 for None."""
    if num_workers is None:
        return min(4, os.cpu_count() or 1)
    if not isinstance(num_workers, int) or num_workers < 0:
        raise ConfigError(f"num_workers must be a whole number of at least 0, got {num_workers!r}")
    return num_workers


def _bf16(precision: str) -> bool:
    known: dict[str, Any] = {"auto": best_precision() == "bf16-mixed", "bf16": True, "fp32": False}
    if precision not in known:
        raise ConfigError(f"precision must be auto, fp32 or bf16, not '{precision}'")
    return known[precision]


if __name__ == "__main__":
    caption()

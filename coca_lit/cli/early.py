"""What is wrong with the values of a config, as far as it shows before constructors are imported, which takes seconds:
first what the config says, then what lies on the disk.
"""

import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from coca_lit import extensions
from coca_lit.cli.assembly import build, data_place
from coca_lit.cli.schema import AUTO, check_complete, unresolved
from coca_lit.errors import LEAST, ConfigError, error_context
from coca_lit.models.generation.options import check_shared
from coca_lit.models.presets import preset
from coca_lit.reading import printable
from coca_lit.runs.run_folder import CHECKPOINTS, NEWEST, restarted

# Keys that name a file with weights, unless it is a released model, or one that a part of the network knows.
WEIGHTS = ("checkpoint", "interpolate_with", "init_from", "ckpt_path", "init_parts.image_encoder")
NAMES = ("auto", "required", "builtin", "photos", "efficientnet_lite0", "efficientnet_lite2")
COUNTED = ("image_size", "data.batch_size", "data.num_workers")
NO_LIMIT = {"trainer.max_epochs": -1, "trainer.max_steps": -1}  # Lightning's words for it


def check_values(cfg: DictConfig) -> None:
    """Raises `ConfigError` for a value that is missing or wrong."""
    check_complete(unresolved(cfg))
    name = OmegaConf.select(cfg, "name", throw_on_resolution_failure=False)
    if isinstance(name, str) and printable(name) != name:  # it is printed, and names a folder
        raise ConfigError(f"name: '{printable(name)}' has characters that control a terminal: choose another")
    for key, least in {**{key: LEAST[key.rpartition(".")[2]] for key in COUNTED}, **NO_LIMIT}.items():
        number = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        if isinstance(number, int | float) and number < least:
            raise ConfigError(f"{key} must be at least {least}, got {number}")
    generate = OmegaConf.select(cfg, "scoring.generate")
    if generate:
        with error_context("scoring"):
            check_shared(generate)
    net = OmegaConf.select(cfg, "model.net")
    if isinstance(net, DictConfig) and net.get("_target_") == "coca_lit.models.create_model" and net.name != AUTO:
        with error_context("model.net.name"):
            preset(net.name)


def check_length(trainer: DictConfig) -> None:
    """Raises `ConfigError` if a training has no end."""
    if all(trainer.get(limit) in (None, -1) for limit in ("max_epochs", "max_steps")):
        raise ConfigError(
            "trainer.max_epochs or trainer.max_steps must be set: the learning rate needs a length; trainer.max_time "
            "may end it earlier"
        )


def resumes(cfg: DictConfig) -> bool:
    """Whether a training goes on in its folder. Then it has its weights: the file that it began with may be gone."""
    obeyed = cfg.ckpt_path == NEWEST or bool(restarted())  # a job that is started again obeyed `ckpt_path` before
    return obeyed and any(Path(cfg.output_dir, CHECKPOINTS).glob("step_*"))


def check_weights(cfg: DictConfig) -> None:
    """Raises `ConfigError` for weights that are neither a file nor a name."""
    of_projects = [f"init_parts.{name}" for name in extensions.declared("init_parts")]
    for key in (*WEIGHTS, *of_projects):
        file = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        if isinstance(file, str) and file not in NAMES and not os.path.exists(os.path.expanduser(file)):
            from coca_lit.weights.hub import PREFIX, hint, released

            if not file.startswith(PREFIX) and released(file) is None:
                raise ConfigError(f"{key}: there is no checkpoint '{file}'{hint(file)}")


def check_data_folder(cfg: DictConfig) -> None:
    """Asks what reads the training data if their folder is not there: it says what it looked for.

    Raises:
        DataNotFoundError: it found nothing.
    """
    if not str(cfg.data.get("_target_")).startswith("coca_lit."):  # one of the user's own may download them
        return
    root = cfg.data.get("root")
    shards = cfg.data.get("shards")
    with data_place(cfg):
        if isinstance(root, str) and not os.path.exists(root) and cfg.data.get("records") is not None:
            build(cfg.data.records, "data.records")(root, cfg.data.get("train_split", "train"))
        elif isinstance(shards, str) and "://" not in shards and not os.path.isdir(os.path.dirname(shards)):
            from coca_lit.data.shards.listing import local_shards

            local_shards(shards)

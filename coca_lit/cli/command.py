"""What every command shares: it composes a config, checks what Hydra would build from it, and explains mistakes."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from coca_lit.cli.arguments import Positional, to_overrides
from coca_lit.cli.config import EvaluateConfig, TrainConfig, check_hydra, explain_override
from coca_lit.cli.sweep import print_sweep
from coca_lit.errors import ConfigError
from coca_lit.runs.launch import job_folder, launched_devices, launched_nodes, run_id
from coca_lit.runs.redaction import redact, redact_configs, redact_overrides

PACKAGE = Path(__file__).resolve().parents[1]
# In a checkout the configs lie beside the package, in a wheel inside it.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())

ConfigStore.instance().store("train_schema", TrainConfig)
ConfigStore.instance().store("evaluate_schema", EvaluateConfig)
OmegaConf.register_new_resolver("run_id", run_id, use_cache=True, replace=True)
for resolver in (job_folder, launched_devices, launched_nodes):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def command(config: str, function: Callable[[DictConfig], Any], positional: Positional = ()) -> None:
    """Runs `function` on the composed `conf/{config}.yaml`. Mistakes of the user are one sentence on standard
    error and exit code 1.

    Args:
        positional: the keys of arguments that are given without one, see `to_overrides`.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed by Hydra
    redact_configs()
    redact_overrides()
    check_what_hydra_builds()
    try:
        sys.argv[1:] = to_overrides(sys.argv[1:], positional)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config)(function)()
    except user_errors() as error:
        sys.exit(f"error: {redact(_explain(error, config))}")
    finally:
        print_sweep()


def check_what_hydra_builds() -> None:
    """Puts our check between Hydra's composing of a config and its building of callbacks, launchers and log handlers.
    There is no public place for it.
    """
    load = ConfigLoaderImpl.load_configuration
    if getattr(load, "checked", False):
        return

    @functools.wraps(load)
    def checked(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        cfg = load(self, *args, **kwargs)
        if "hydra" in cfg:
            check_hydra(OmegaConf.to_container(cfg.hydra, resolve=False))
        return cfg

    checked.checked = True  # type: ignore[attr-defined]  # a mark on a function
    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]  # see above


def user_errors() -> tuple[type[Exception], ...]:
    """Exceptions whose message is all that a user needs; anything else is a bug and keeps its traceback."""
    errors: tuple[type[Exception], ...] = (ConfigError, HydraException, OmegaConfBaseException, yaml.YAMLError)
    if "coca_lit.data.records" not in sys.modules:  # no data were touched, so the class need not be imported
        return (*errors, FileNotFoundError)
    from coca_lit.errors import CheckpointError, DataError, TrainingError

    return (*errors, CheckpointError, DataError, FileNotFoundError, TrainingError)


def _explain(error: Exception, config: str) -> str:
    if isinstance(error, HydraException):
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            options = GlobalHydra.instance().config_loader().get_group_options
            chosen = [arg for arg in sys.argv[1:] if arg.rpartition("=")[2] in options(arg.partition("=")[0])]
            return explain_override(error, lambda: hydra.compose(config, chosen), options)
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark) is not None:
        return f"'{mark.name}', line {mark.line + 1}: {error.problem}"
    if isinstance(error.__cause__, ConfigError):  # raised while a value was resolved
        return str(error.__cause__)
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    message = str(error).strip().splitlines()[-1]  # from a worker process it comes after a traceback and a name
    return message.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")

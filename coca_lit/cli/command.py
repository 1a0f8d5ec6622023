"""From words on a command line to a composed config and the function of the command.

Hydra composes: `coca_lit.cli.words` turns words into overrides in its grammar, `compose` puts `++` before every key
that chooses no config group, so that Hydra takes any key, and `coca_lit.cli.schema` finds those that nobody takes.
`coca_lit.cli.assembly` builds objects from the config.
"""

import argparse
import difflib
import functools
import gc
import re
import signal
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from coca_lit import __version__, extensions
from coca_lit.cli.allowed import OF_HYDRA, check_hydra, check_packages, check_targets, hydra_builds, trust_modules
from coca_lit.cli.early import check_data_folder, check_length, check_values, check_weights, resumes
from coca_lit.cli.runtime import keep_imports
from coca_lit.cli.schema import MissingValueError, check, targets, unresolved
from coca_lit.cli.sweep import end_sweep, job_record, sweep_score
from coca_lit.cli.words import Positional, parse, quote
from coca_lit.errors import NO_SUGGESTION, ConfigError, UserError, suggest
from coca_lit.machine import is_first_process, set_up_environment
from coca_lit.reading import printable_lines
from coca_lit.runs.launch import (
    announce,
    import_from_current_folder,
    isolate,
    job_folder,
    launched_devices,
    launched_nodes,
    print_any_text,
    run_id,
)
from coca_lit.runs.redaction import masked_yaml, redact
from coca_lit.runs.run_folder import begin_at

PACKAGE = Path(__file__).resolve().parents[1]
# In a checkout the configs lie beside the package, in a wheel inside it.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())
SEARCH_PATH = "hydra.searchpath="
FEW_OPTIONS = 12  # that a sentence lists
KINDS = ("captions", "retrieval", "labels", "answers")  # of evaluations, by what a data set says of its images
_KEY = re.compile(r"(?!hydra\.)[A-Za-z_][\w-]*(\.[\w-]+)*", re.ASCII)


def register_resolver(name: str, function: Callable[..., Any], use_cache: bool = False) -> None:
    """Lets configs call a function as `${name:…}`."""
    # OmegaConf 2.4 has another name for it, by which 2.3 knew something else.
    has_new_name = version("omegaconf") >= "2.4"
    register: Any = OmegaConf.register_resolver if has_new_name else OmegaConf.register_new_resolver
    register(name, function, use_cache=use_cache, replace=True)


register_resolver("run_id", run_id, use_cache=True)
for resolver in (job_folder, launched_devices, launched_nodes):
    register_resolver(resolver.__name__, resolver)


def command(config: str, function: Callable[[DictConfig], Any], positional: Positional = ()) -> None:
    """Runs `function` on the composed `conf/{config}.yaml`. Mistakes of the user are one sentence on standard error
    and exit code 1.

    Args:
        positional: the keys of arguments that are given without one, see `parse`.
    """
    with _as_command(config):
        options, words = parse(sys.argv[1:], positional)
        if _answered(config, options, words):
            return
        if options.multirun:
            raise ConfigError(f"coca-{config} has no sweeps")
        cfg = _composed(config, words)
        _check(config, cfg, _shipped(config), options_of(config, "", words))
        function(cfg)


def job_command(
    config: str,
    function: Callable[[DictConfig], Any],
    add_overrides: Callable[[list[str]], list[str]] | None = None,
    began: float | None = None,
) -> None:
    """As `command`, but Hydra makes the run folder and calls the function; for each job of a sweep, where its launcher
    starts it.

    Args:
        add_overrides: returns the given overrides and those that follow from them.
        began: when the process began, in seconds since 1970; now if not given.
    """
    began = began if began is not None else time.time()
    with _as_command(config):
        options, words = parse(sys.argv[1:])
        if _answered(config, options, words):
            return
        if add_overrides is not None:
            words = add_overrides(words)
        overrides = _overrides(config, words)
        known = (_shipped(config), options_of(config, "", words))
        failures: list[Exception] = []

        @functools.wraps(function)
        def job(cfg: DictConfig) -> Any:
            begin_at(time.time() if options.multirun else began)
            try:
                with job_record():
                    _check(config, cfg, *known)
                    return sweep_score(function(cfg), cfg)
            except Exception as error:  # Hydra would print all overrides before it, secrets included
                failures.append(error)
                if is_first_process():  # the others must not remove the folder before it has written there
                    _remove_empty(Path(HydraConfig.get().runtime.output_dir))
                elif not isinstance(error, UserError):  # a sweep tells what befell the first process
                    print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
                return None

        with _hydra(config, words) as machine:
            try:
                (machine.multirun if options.multirun else machine.run)(config, job, overrides)
            except HydraException:  # some of them are an OSError, too
                raise
            except OSError as error:
                raise ConfigError(f"the run cannot be started: {error}") from error
            finally:
                swept = end_sweep()
        if failures and not swept:
            raise failures[0]


@contextmanager
def _as_command(config: str) -> Iterator[None]:
    """Around a program: processes that it starts import from where it does, its threads sleep while they wait, and an
    error of the user is one sentence and exit code 1.
    """
    isolate()
    set_up_environment()
    print_any_text()
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        example = f"; for example: {_first_example(config)}" if isinstance(error, MissingValueError) else ""
        sys.exit(f"error: {printable_lines(redact(explain(error)))}{example}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:  # a bug, whose traceback may name a secret
        text = "".join(traceback.format_exception(error))
        masked = redact(text)
        if masked == text:
            raise
        sys.exit(masked)


def _answered(config: str, options: argparse.Namespace, words: Sequence[str]) -> bool:
    """Whether the options ask for information alone, which is printed then; else the command says that it starts."""
    if options.version:
        print(f"coca_lit {__version__}")
    elif options.help:
        print(_filled_help(config, words))
    elif options.cfg is not None:
        cfg = compose(config, words, with_hydra=True)
        HydraConfig.instance().set_config(cfg)
        keys = [str(key) for key in cfg if options.cfg == "all" or (key == "hydra") == (options.cfg == "hydra")]
        shown = OmegaConf.masked_copy(cfg, keys)
        shown._set_parent(cfg)  # what references lead to
        print(masked_yaml(shown, options.resolve), end="")
    else:
        announce(f"coca-{config}")
        return False
    return True


@contextmanager
def _hydra(config: str = "train", words: Sequence[str] = ()) -> Iterator[Any]:
    """Hydra on our configs. What it says of a file that it cannot read or find becomes a sentence of ours.

    Args:
        config: the command's.
        words: overrides, of which one may name a user's own folder.
    """
    _store_configs()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The version_base parameter")  # Hydra 1.3 needs it
        initialized = hydra.initialize_config_dir(str(CONF), job_name=config, version_base="1.3")
    try:
        with hydra_builds(*OF_HYDRA), initialized:  # also the filter of secrets in logs
            machine: Any = GlobalHydra.instance().hydra
            loader = machine.config_loader
            loader.load_configuration = functools.partial(_load_checked, loader.load_configuration)
            yield machine
    except UnicodeDecodeError as error:
        raise ConfigError(f"a config is no text in UTF-8 ({error}): save it as UTF-8") from error
    except MissingConfigException as error:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        raise ConfigError(_no_such_option(config, group, option, words)) from error
    except ConfigCompositionException as error:
        lacks_package = re.match(r"In 'experiment/([^']+)': (?s:.*)'\w+@experiment\.", str(error))
        if lacks_package:
            file = f"experiment/{lacks_package[1]}.yaml"
            raise ConfigError(f"the first line of {file} must be: # @package _global_") from error
        # Of Hydra 1.3; with 1.4 the user's file is taken.
        same_name = re.match(r"'(.+)' is validated against ConfigStore schema", str(error))
        if same_name:
            raise ConfigError(f"{same_name[1]}.yaml has the name of an option of coca_lit: choose another") from error
        raise


def _load_checked(load: Callable[..., DictConfig], *arguments: Any, **options: Any) -> DictConfig:
    """What Hydra loads, for a run or a job of a sweep, before it builds anything."""
    config = load(*arguments, **options)
    check_hydra(config)
    return config


@functools.cache
def _store_configs() -> None:
    """Gives Hydra what our configs take from all projects: the folders of their data sets, their evaluations and config
    groups, the options of their kinds of input, and the functions that their configs call. And for each data set the
    option `evals=NAME`: its evaluations NAME_KIND, unless a file says which they are.
    """
    store = ConfigStore.instance()
    store.store("roots_of_projects", extensions.declared("roots"), package="roots")
    store.store("init_parts_of_projects", dict.fromkeys(extensions.declared("init_parts")), package="init_parts")
    store.store("_usual_of_projects", {"defaults": extensions.listed("usual_evals")}, group="evals")
    options = extensions.input_options()
    store.store("input_options", {name: option.default for name, option in options.items()})
    store.store("no_input_options", dict.fromkeys(options))
    changeable = [name for name, option in extensions.model_options().items() if option.evaluation]
    store.store("model_options", dict.fromkeys(changeable))
    store.store("groups_of_projects", {"defaults": [{name: None} for name in extensions.listed("groups")]})
    evals = _files("evals")
    for name in _files("data") - evals:
        of_data = [f"{name}_{kind}" for kind in KINDS if f"{name}_{kind}" in evals]
        if of_data:
            store.store(name, {"defaults": of_data}, group="evals")
    for name, target in extensions.declared("resolvers").items():
        register_resolver(name, functools.partial(_call, target))


def _files(group: str) -> set[str]:
    """The names of the files of a config group, ours and those of projects."""
    return {file.stem for folder in (CONF, *extensions.config_folders()) for file in (folder / group).glob("*.yaml")}


def input_help() -> str:
    """A line for each option of other kinds of input than images, for the help of commands that read them."""
    return "\n".join(f"    {name:20}{option.help}" for name, option in extensions.input_options().items())


register_resolver("input_help", input_help)


def _call(target: str, *arguments: Any) -> Any:
    return extensions.load(target)(*arguments)


def _with_search_path(words: Sequence[str]) -> list[str]:
    """The words, with the configs of projects on Hydra's search path behind the user's own."""
    folders = [quote(f"file://{folder}") for folder in extensions.config_folders()]
    others = [word for word in words if not word.startswith(SEARCH_PATH)]
    for word in words:
        if word.startswith(SEARCH_PATH):
            of_user = word.removeprefix(SEARCH_PATH).strip().removeprefix("[").removesuffix("]")
            folders = [of_user, *folders]
    return [*others, f"{SEARCH_PATH}[{','.join(folders)}]"]


def compose(config: str, words: Sequence[str] = (), with_hydra: bool = False) -> DictConfig:
    """The config that a command gets from `conf/{config}.yaml` and these overrides, whose keys are checked.

    Args:
        with_hydra: with Hydra's own part.
    """
    cfg = _composed(config, words, with_hydra)
    shipped = _shipped(config)
    groups = options_of(config, "", words)
    check(_without_hydra(cfg), shipped, groups, constructors=False)
    with _imports():
        _check_arguments(cfg, shipped, groups)
    return cfg


def _composed(config: str, words: Sequence[str], with_hydra: bool = False) -> DictConfig:
    overrides = _overrides(config, words)
    with _hydra(config, words):
        return hydra.compose(config, overrides, return_hydra_config=with_hydra)


def _overrides(config: str, words: Sequence[str]) -> list[str]:
    """The words with `++` before all keys but those of config groups, which makes Hydra take any.

    Raises:
        ConfigError: null or nothing in place of the name of an option, on which Hydra breaks off.
    """
    overrides = []
    groups = options_of(config, "", words)
    for word in _with_search_path(words):
        key, _, value = word.partition("=")
        if key in groups and word != key and value in ("", "null"):
            got = value or "nothing"
            raise ConfigError(f"{key} must be an option or a list of options, got {got}: {key}=[] chooses none")
        overrides.append(f"++{word}" if _KEY.fullmatch(key) and key not in groups and word != key else word)
    return overrides


@functools.cache
def _shipped(config: str) -> dict[str, Any]:
    """`conf/{config}.yaml` as plain values, without overrides."""
    with _hydra():
        return unresolved(hydra.compose(config))


def _check(config: str, cfg: DictConfig, shipped: dict[str, Any], groups: Sequence[str]) -> None:
    """Says what is missing or wrong in a config, what is known soonest first, and imports what it wants imported."""
    check(_without_hydra(cfg), shipped, groups, constructors=False)
    check_values(cfg)
    trust_modules(cfg.imports or ())
    with _imports():
        if config == "train":
            check_length(cfg.trainer)
            if not resumes(cfg):
                check_weights(cfg)
            check_data_folder(cfg)
        elif config != "plan":  # which reads no files
            check_weights(cfg)
        _check_arguments(cfg, shipped, groups)
    if config != "plan" and "torch" not in sys.modules:
        gc.disable()  # until `configure_libraries`
    if cfg.imports:
        from coca_lit.models.registry import import_modules

        try:
            import_modules(cfg.imports)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _without_hydra(cfg: DictConfig) -> dict[str, Any]:
    """A config as plain values, without Hydra's own part."""
    return {key: value for key, value in unresolved(cfg).items() if key != "hydra"}


def _check_arguments(cfg: DictConfig, shipped: dict[str, Any], groups: Sequence[str]) -> None:
    """Compares a config with what its constructors and the config as shipped know."""
    node = _without_hydra(cfg)
    named = node["imports"] if isinstance(node.get("imports"), list) else []
    import_from_current_folder([*named, *targets(node)])
    trust_modules(named)
    check_packages(targets(node))
    check(node, shipped, groups)  # before all is imported: it begins where a key is misspelt
    check_targets(targets(node))


@contextmanager
def _imports() -> Iterator[None]:
    """Around the first import of PyTorch, of whose seconds a third would go into looking for garbage."""
    first = "torch" not in sys.modules
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            keep_imports()


def _remove_empty(folder: Path) -> None:
    """Removes a folder in which nothing was written, and those in the current one that were made for it."""
    with suppress(OSError):
        for place in (folder, *folder.parents):
            if place == folder or Path.cwd() in place.parents:
                with suppress(FileNotFoundError):
                    place.rmdir()


def explain(error: Exception) -> str:
    """One sentence about what a user did wrong."""
    if isinstance(error, OverrideParseException):
        override = error.override.removeprefix("++")
        key, _, value = override.partition("=")
        return f"'{override}' is not in Hydra's grammar; put the value in quotes: {key}='\"{value}\"'"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"'{error.problem_mark.name}', line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, HydraException | yaml.YAMLError):
        texts = [str(part) for part in (error, error.__cause__) if part is not None]
        return " ".join(" ".join(texts).split())
    if isinstance(error.__cause__, UserError) and not isinstance(error, UserError):  # raised by a resolver
        return str(error.__cause__)
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    message = lines[-1]  # from a worker process it comes after a traceback and a name
    return message.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


# The configs in `conf` and in a user's own folders: their groups, options and help


def _no_such_option(config: str, group: str, option: str, words: Sequence[str]) -> str:
    """What is wrong with the name of an option of a config group."""
    missing = f"'{group}' has no option '{option}'"
    if group == "evals" and option in options_of(config, "data", words):
        return f"no evaluations go with data={option}: add evals=[], or a file evals/{option}.yaml that lists them"
    unnamed = [file.parents[2] for file in PACKAGE.glob(f"projects/*/conf/{group}/{option}.yaml")]
    if unnamed:
        return f"{missing}: the folder {unnamed[0]} has it, but pyproject.toml has no entry point of that folder"
    options = options_of(config, group, words)
    meant = suggest(option, options)
    if meant != NO_SUGGESTION:
        return f"{missing}{meant}"
    if len(options) <= FEW_OPTIONS:
        return f"{missing}. The options: {', '.join(options)}"
    return f"{missing}. The nearest: {', '.join(difflib.get_close_matches(option, options, n=5, cutoff=0))}"


def is_shipped(group: str, option: str) -> bool:
    """Whether an option of a config group is ours or that of a project, and not the user's own."""
    return option in _files(group)


def options_of(config: str, group: str = "", words: Sequence[str] = ()) -> tuple[str, ...]:
    """The options of a config group, such as the evaluations, or without one the groups; on the user's own search path
    too, if the words name one.
    """
    search = [word for word in _with_search_path(words) if word.startswith(SEARCH_PATH)]
    return _options(config, group, tuple(search))


@functools.cache
def _options(config: str, group: str, search: tuple[str, ...]) -> tuple[str, ...]:
    kind = ObjectType.CONFIG if group else ObjectType.GROUP
    with _hydra() as machine:
        options = machine.config_loader.get_group_options(group, kind, config, list(search))
    return tuple(option for option in options if not option.startswith("_"))  # base files of others


def _template(config: str) -> str:
    """The template of the help, with the name of the command as it was typed."""
    with _hydra():  # unchecked: the constructors are not imported for the help
        template = str(hydra.compose(config, return_hydra_config=True).hydra.help.template)
    return template if sys.argv[0].endswith(".py") else template.replace("python train.py", "coca-train")


def _filled_help(config: str, words: Sequence[str]) -> str:
    """The template in `conf/hydra/help` with the options of all config groups."""
    groups = {*options_of(config, words=words)} - {"hydra", "experiment"}
    template = _template(config)
    for place, named in (("$APP_CONFIG_GROUPS", sorted(groups)), ("$EVALUATIONS", ["evals"])):
        lines = [f"{group}: {', '.join(options_of(config, group, words))}" for group in named]
        filled = [textwrap.fill(line, width=150, subsequent_indent="  ") for line in lines]
        template = template.replace(place, "\n".join(filled))
    return template.replace("$EXPERIMENTS", _experiments(config, words)) + _added_by_packages()


def _experiments(config: str, words: Sequence[str]) -> str:
    """A line for each experiment, by task. The first sentence and the task are comments at the top of its file."""
    own_folders = re.findall(r"file://([^\"',\]]+)", " ".join(words))
    folders = [CONF, *extensions.config_folders(), *map(Path, own_folders)]
    tasks: dict[str, list[str]] = {}
    for name in options_of(config, "experiment", words):
        files = [folder / "experiment" / f"{name}.yaml" for folder in folders]
        text = next((file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()), "")
        comments = re.findall(r"^#\s?(?!\s*@package)(.*)", text, re.M)
        fields = [line for line in comments if re.match(r"[A-Z]\w+:\s", line)]  # from the first one on
        above = comments[: comments.index(fields[0])] if fields else comments
        sentence = re.split(r"[.:;](?: |$)", " ".join(above), maxsplit=1)[0]
        task = next((line.removeprefix("Task:").strip() for line in fields if line.startswith("Task:")), "others")
        tasks.setdefault(task, []).append(f"    {name:26}{sentence}")
    return "\n".join("\n".join([f"  {task}", *lines]) for task, lines in tasks.items())


def _added_by_packages() -> str:
    """What the projects of other installed packages add, for the end of the help; nothing if there are none."""
    lines: list[str] = []
    for project in extensions.projects():
        if project.is_own:
            continue
        lines.append(f"  {project.name} (from the package {project.distribution}): {project.about}")
        files = sorted((project.folder / "conf").glob("*/*.yaml"))
        shown = [f"{file.parent.name}={file.stem}" for file in files if not file.stem.startswith("_")]
        lines.append(textwrap.fill(", ".join(shown), width=150, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(["\n\nAdded by installed packages", *lines]) if lines else ""


def _first_example(config: str) -> str:
    """The first example of the help."""
    line = _template(config).partition("Examples\n")[2].splitlines()[0]
    return f"{re.split(r'  +', line.strip())[0]} (more: coca-{config} --help)"

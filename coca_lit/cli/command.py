"""From the words on a command line to a composed config, or one sentence on what is wrong with them.

Read from the top: `command` is what every entry point calls. Words become overrides in Hydra's grammar
(`split_arguments`), Hydra composes them with `conf/` (`compose`, or `hydra.main` where there are sweeps),
`coca_lit.cli.checks` finds what the config alone shows to be wrong, and the command's function gets the config.
`coca_lit.cli.assembly` builds objects from it.
"""

import argparse
import functools
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from coca_lit import __version__
from coca_lit.cli.assembly import has_argument, known_arguments
from coca_lit.cli.checks import RENAMED, MissingValueError, check, check_places, check_scalars, unresolved, written
from coca_lit.cli.sweep import job_record, print_sweep
from coca_lit.errors import ConfigError, UserError, suggest
from coca_lit.runs.launch import is_first_process, job_folder, launched_devices, launched_nodes, run_id
from coca_lit.runs.redaction import masked_yaml, redact

PACKAGE = Path(__file__).resolve().parents[1]
# In a checkout the configs lie beside the package, in a wheel inside it.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())

Positional = str | Sequence[str]  # one key that takes all words as a list, or keys that take one word each, in order

OmegaConf.register_new_resolver("run_id", run_id, use_cache=True, replace=True)
for resolver in (job_folder, launched_devices, launched_nodes):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def command(
    config: str, function: Callable[[DictConfig], Any], positional: Positional = (), multirun: bool = False
) -> None:
    """Runs `function` on the composed `conf/{config}.yaml`. Mistakes of the user are one sentence on standard error
    and exit code 1.

    Args:
        positional: the keys of arguments that are given without one, see `split_arguments`.
        multirun: whether the command has sweeps, launchers and a run folder; `hydra.main` makes them.
    """
    overrides: list[str] = []
    use_current_folder()
    try:
        flags, overrides = split_arguments(sys.argv[1:], positional)
        options, further = _parser().parse_known_args(flags)
        if options.config_dir is not None:
            overrides = [*overrides, _search_path(options.config_dir)]
        if options.version:
            print(f"coca_lit {__version__}")
        elif options.help:
            print(_help(config, overrides))
        elif options.cfg is not None:
            print(_shown(compose(config, overrides, with_hydra=True), options), end="")
        elif multirun:
            _run_with_hydra(config, function, [*further, *accept_arguments(config, overrides)])
        elif further:
            raise ConfigError(f"there is no option {further[0]}: see coca-{config} --help")
        else:
            _start(function, compose(config, overrides), _defaults(config, overrides))
    except (UserError, HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        example = f"; for example: {_example(config)}" if isinstance(error, MissingValueError) else ""
        sys.exit(f"error: {redact(explain(error, config, overrides))}{example}")


def use_current_folder() -> None:
    """Lets configs name code in the folder that the command was started from, as `python -m` does. Configs are code:
    whoever runs a config runs what it names.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def compose(config: str, overrides: Sequence[str] = (), with_hydra: bool = False) -> DictConfig:
    """The config that a command gets from `conf/{config}.yaml` and these overrides."""
    overrides = accept_arguments(config, overrides)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config, overrides, return_hydra_config=with_hydra)


def accept_arguments(config: str, overrides: Sequence[str]) -> list[str]:
    """The overrides, with Hydra's `++` before keys that no file lists but the constructor of their node takes: the
    files need not repeat the defaults of the constructors.

    Raises:
        ConfigError: something else than a name or a list of names stands where an option is chosen, see `_Options`.
    """
    _Options(config, overrides).check()
    keys = {word: word.partition("=")[0] for word in overrides if re.match(r"[A-Za-z_][\w-]*\.[\w.-]+=", word)}
    if not keys:
        return [*overrides]
    known = _Known(config, overrides)
    without_targets = _Known(config, [word for word in overrides if "._target_=" not in word])
    accepted = set()
    for word, key in keys.items():
        node = without_targets if key.endswith("._target_") else known
        if not node.has(key) and node.is_argument(key):
            accepted.add(word)
    return [f"++{word}" if word in accepted else word for word in overrides]


class _Defaults(NamedTuple):
    """Plain values of a config as nobody changed it, and of the options that were chosen."""

    config: str
    general: Any
    chosen: Any


def _defaults(config: str, overrides: Sequence[str]) -> _Defaults:
    general = _composed(config)
    try:
        chosen = _composed(config, *_Options(config, overrides).choices())
    except HydraException:  # the run itself will say what is wrong
        chosen = general
    return _Defaults(config, general, chosen)


@functools.cache
def _composed(config: str, *overrides: str) -> Any:
    return unresolved(compose(config, overrides))


def _start(function: Callable[[DictConfig], Any], cfg: DictConfig, defaults: _Defaults) -> Any:
    node = unresolved(cfg)
    check(node, defaults.general)
    check_scalars(node, defaults.chosen)
    if defaults.config != "plan":  # which needs no weights and no data
        check_places(cfg)
    use_current_folder()  # in a process that a launcher started
    if defaults.config != "train" and sys.stderr.isatty() and is_first_process():  # a training prints its name
        print(f"coca-{defaults.config}: loading libraries …", file=sys.stderr, flush=True)
    if cfg.imports:
        from coca_lit.models.registry import import_modules

        try:
            import_modules(cfg.imports)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return function(cfg)


# Sweeps, launchers and run folders


def _run_with_hydra(config: str, function: Callable[[DictConfig], Any], words: Sequence[str]) -> None:
    failures: list[Exception] = []
    defaults = _defaults(config, words)

    @functools.wraps(function)
    def job(cfg: DictConfig) -> Any:
        try:
            with job_record():
                return _start(function, cfg, defaults)
        except Exception as error:  # Hydra would print all overrides before it, secrets included
            failures.append(error)
            if is_first_process():  # the others must not remove the folder before it has written there
                with suppress(OSError):
                    os.rmdir(HydraConfig.get().runtime.output_dir)  # where nothing was written
            return None

    swept = False
    try:
        with _hydra_arguments(words):
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config)(job)()
    except HydraException:  # some of them are an OSError, too
        raise
    except OSError as error:
        raise ConfigError(f"the run cannot be started: {error}") from error
    finally:
        swept = print_sweep()
    if failures and not swept:
        raise failures[0]


@contextmanager
def _hydra_arguments(words: Sequence[str]) -> Iterator[None]:
    """Gives words to `hydra.main`, which takes them from `sys.argv` alone (facebookresearch/hydra#2459), and prints
    errors itself unless `HYDRA_FULL_ERROR` is set.
    """
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [argv[0], *words], "1"
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


# Arguments

_OVERRIDE = re.compile(r"[+~]*(?:hydra/)?[A-Za-z_][\w.@:-]*=", re.ASCII)
_FLAGS_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun"),
}
_RANGE = r"\{\d+\.\.\d+\}"
_PRIMITIVE = re.compile(rf"""(?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?:{_RANGE}|[^\[\]{{}}(),"'])+""")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--package", "-p")
    parser.add_argument("--config-dir", "-cd", type=Path)
    return parser


def split_arguments(arguments: Sequence[str], positional: Positional = ()) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides in Hydra's grammar; words without a key go to the keys of `positional`.

    A word is an override if it looks like `key=value` and no file has that name. Whatever follows `--` is a word.

    Raises:
        ConfigError: more words than keys.
    """
    flags: list[str] = []
    overrides: list[str] = []
    words: list[str] = []
    for i, argument in enumerate(arguments):
        if argument == "--" and positional:
            words += arguments[i + 1 :]
            break
        if i == 0 and argument in ("help", "version") and not os.path.lexists(argument):
            raise ConfigError(
                f"expected key=value{' or a file' * bool(positional)}, found '{argument}': did you mean --{argument}?"
            )
        if argument.startswith("-") or (i > 0 and arguments[i - 1] in _FLAGS_WITH_VALUE):
            flags.append(argument)
        elif not positional or (_OVERRIDE.match(argument) and not os.path.lexists(argument)):
            overrides.append(to_override(argument))
        else:
            words.append(argument)
    return flags, [*overrides, *_name(words, positional)]


def _name(words: Sequence[str], positional: Positional) -> list[str]:
    if isinstance(positional, str):
        return [f"{positional}=[{','.join(map(quote, words))}]"] if words else []
    if len(words) > len(positional):
        surplus = " ".join(words[len(positional) :])
        keys = " and ".join(key.upper() for key in positional)
        raise ConfigError(f"expected {keys} and key=value, found also '{surplus}': quote a text of several words")
    return [f"{key}={quote(word)}" for key, word in zip(positional, words, strict=False)]


def to_override(word: str) -> str:
    """`key=value` with quotes where Hydra's grammar needs them: it knows no letters beyond ASCII and takes the brace of
    /data/{00000..00099}.tar for the start of a dictionary.
    """
    key, equals, value = word.partition("=")
    if not equals:
        return word
    quoted = [f"{key}={_PRIMITIVE.sub(_quote_primitive, value)}"]
    if re.match(rf"[^\[{{\"']|{_RANGE}", value):  # neither a list, a dictionary nor quoted: text as a whole
        quoted.append(f"{key}={QuotedString(value, Quote.double).with_quotes()}")
    return next((override for override in (word, *quoted) if _parsed(override) is not None), word)


def _quote_primitive(found: re.Match[str]) -> str:
    """Quotes one value within a list, a dictionary or a sweep; `name: ` before it is the key in a dictionary."""
    text = found[0]
    if found["quoted"] or (text.isascii() and not re.search(_RANGE, text)):
        return text
    key = re.match(r"\s*[A-Za-z_][\w-]*\s*:\s+|\s*", text, re.ASCII)
    start = key.end() if key is not None else 0
    return f"{text[:start]}{QuotedString(text[start:].rstrip(), Quote.double).with_quotes()}"


def quote(word: str) -> str:
    """A string in Hydra's grammar for `word`, with any characters."""
    literal = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", word)  # no interpolation
    return QuotedString(literal, Quote.double).with_quotes()


def _search_path(folder: Path) -> str:
    if not folder.is_dir():
        raise ConfigError(f"--config-dir: there is no folder '{folder}'")
    return f"hydra.searchpath=[{quote(f'file://{folder.absolute()}')}]"


def _parsed(override: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def _help(config: str, overrides: Sequence[str]) -> str:
    """What `--help` prints: the template in `conf/hydra/help`, with the options of all config groups."""
    known = _Known(config, [word for word in overrides if word.startswith("hydra.searchpath=")])
    groups = [group for group in known.options("", ObjectType.GROUP) if group not in ("hydra", "experiment")]
    template = str(compose(config, with_hydra=True).hydra.help.template)
    for place, listed in (("$APP_CONFIG_GROUPS", sorted(groups)), ("$EVALUATIONS", ["evals"])):
        lines = [
            textwrap.fill(f"{group}: {', '.join(known.options(group))}", width=140, subsequent_indent="  ")
            for group in listed
        ]
        template = template.replace(place, "\n".join(lines))
    return template.replace("$EXPERIMENTS", _experiments(known))


def _example(config: str) -> str:
    """The first example of the help."""
    lines = str(compose(config, with_hydra=True).hydra.help.template).partition("Examples\n")[2].splitlines()
    return f"{re.split(r'  +', lines[0].strip())[0]} (more: coca-{config} --help)"


def _experiments(known: "_Known") -> str:
    """All experiments by task, a line each: the task and the first sentence are comments at the top of the file."""
    tasks: dict[str, list[str]] = {}
    for name in known.options("experiment"):
        found = known.file("experiment", name)
        lines = re.findall(r"^#\s?(?!\s*@package)(.*)", found.read_text() if found is not None else "", re.M)
        text = " ".join(itertools.takewhile(lambda line: not re.match(r"[A-Z]\w+:\s", line), lines))
        task = next((line.removeprefix("Task:").strip() for line in lines if line.startswith("Task:")), "others")
        tasks.setdefault(task, []).append(f"    {name:26}{re.split(r'[.:;](?: |$)', text, maxsplit=1)[0]}")
    return "\n".join("\n".join([f"  {task}", *experiments]) for task, experiments in tasks.items())


def _shown(cfg: DictConfig, options: argparse.Namespace) -> str:
    """What `--cfg job` prints: the config without its secrets."""
    HydraConfig.instance().set_config(cfg)
    keys = [str(key) for key in cfg if options.cfg == "all" or (key == "hydra") == (options.cfg == "hydra")]
    shown = OmegaConf.masked_copy(cfg, keys)
    if options.package is not None:
        shown = OmegaConf.select(shown, options.package)
        if not OmegaConf.is_config(shown):
            raise ConfigError(f"--package: there is no part '{options.package}' in the config")
    return masked_yaml(shown, options.resolve)


# Mistakes


def explain(error: Exception, config: str, overrides: Sequence[str]) -> str:
    """One sentence about what a user did wrong, and what was probably meant."""
    if isinstance(error, OverrideParseException):
        return _explain_grammar(error.override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        return _explain_option(error, config, overrides)
    if isinstance(error, HydraException):
        return _explain_composition(error, config, overrides)
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark) is not None:
        return f"'{mark.name}', line {mark.line + 1}: {error.problem}"
    if isinstance(error.__cause__, UserError) and not isinstance(error, UserError):  # raised by a resolver
        return str(error.__cause__)
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    message = str(error).strip().splitlines()[-1]  # from a worker process it comes after a traceback and a name
    return message.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def _explain_grammar(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"expected key=value, found '{override}'"
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        return f"'{override}' is not in Hydra's grammar ({error}); put the value in quotes: {key}='\"{value}\"'"
    return override


def _explain_option(error: MissingConfigException, config: str, overrides: Sequence[str]) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = _Known(config, overrides).options(group)
    where = f"'{group}' has no option" if group else "there is no config"
    return f"{where} '{option}'{suggest(option, options)} The options: {', '.join(options)}"


def _explain_composition(error: HydraException, config: str, overrides: Sequence[str]) -> str:
    known = _Known(config, overrides)
    if isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError):
        for override in known.overrides:
            key = override.key_or_group
            added = override.is_add() or override.is_force_add() or known.is_argument(key)
            if not (added or known.has(key)):
                return f"there is no key '{key}'{known.hint(key)}"
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}: {str(error.__cause__).splitlines()[0]}".removeprefix("Error merging override ")
    unknown = (name for name in re.findall(r"'([\w.@]+)'", text) if name not in known.names)
    hints = (suggest(name, known.names) for name in unknown)
    return text.rstrip(".") + next((hint for hint in hints if hint != "."), ".")


class _Options:
    """Config groups and their options, on the user's own search path too, and the overrides that choose among them."""

    def __init__(self, config: str, overrides: Sequence[str] = ()) -> None:
        self.config = config
        self.overrides = [parsed for override in overrides if (parsed := _parsed(override)) is not None]
        self.search = tuple(str(o.input_line) for o in self.overrides if o.key_or_group == "hydra.searchpath")

    def options(self, group: str, kind: ObjectType = ObjectType.CONFIG) -> tuple[str, ...]:
        return _options(self.config, self.search, group, kind)

    def file(self, group: str, option: str) -> Path | None:
        """The file of an option, if it is on this machine's disk."""
        searched = [o.value() for o in self.overrides if o.key_or_group == "hydra.searchpath"]
        places = [str(place) for places in searched if isinstance(places, list) for place in places]
        folders = [CONF, *(Path(place.removeprefix("file://")) for place in places)]
        return next((path for folder in folders if (path := folder / group / f"{option}.yaml").is_file()), None)

    def check(self) -> None:
        """Raises `ConfigError` for a choice that Hydra refuses with a traceback, such as `logger=null`."""
        for override in self.overrides:
            value, group = override.value(), override.key_or_group
            given = override.is_delete() or override.is_sweep_override() or isinstance(value, str | list)
            if not given and self.options(group):
                raise ConfigError(
                    f"{group} must be the name of an option or a list of names, got {written(value)}: "
                    f"{group}=[] chooses none"
                )

    def choices(self) -> list[str]:
        """The overrides that choose an option: with them, `compose` has the defaults of all others."""
        chosen = (o for o in self.overrides if not o.is_sweep_override() and self.options(o.key_or_group))
        return [*self.search, *(str(o.input_line) for o in chosen)]


class _Known(_Options):
    """Keys, config groups and options that a command line could have named, on the user's own search path too."""

    def __init__(self, config: str, overrides: Sequence[str] = ()) -> None:
        super().__init__(config, overrides)
        single = [(o.key_or_group, str(o.input_line)) for o in self.overrides if not o.is_sweep_override()]
        targets = [f"++{line.lstrip('+')}" for key, line in single if key.endswith("._target_")]
        try:
            self.nodes = _listed(config, (*self.choices(), *targets))
        except HydraException:  # something is wrong with the groups, too
            self.nodes = _listed(config, self.search)
        self.names = [*self.nodes, *self.options("", ObjectType.GROUP)]
        own = (key for key in self.nodes if not key.startswith("hydra"))
        # lr: model.optimizer.lr; of several keys the one that is nearest to the root
        self.leaves = {key.rpartition(".")[2]: key for key in sorted(own, key=lambda key: -key.count("."))}

    def has(self, key: str) -> bool:
        return key in self.names or bool(self.options(key))

    def hint(self, key: str) -> str:
        """The end of a sentence about a key that is not there, see `suggest`."""
        hint = suggest(key, [*self.names, *self.arguments(key)], self.leaves | RENAMED)
        if hint != "." or "." in key:
            return hint
        builders = [name for name, node in self.nodes.items() if isinstance(node, dict) and "_target_" in node]
        arguments = [argument for name in builders for argument in self.arguments(f"{name}.")]
        return suggest(key, [], {argument.rpartition(".")[2]: argument for argument in reversed(arguments)})

    def is_argument(self, key: str) -> bool:
        """Whether the constructor of the node that holds the key takes it, or the key lies in a dictionary that the
        constructor takes.
        """
        owner, argument = self._owner(key)
        return owner is not None and has_argument(self.nodes[owner]["_target_"], argument)

    def arguments(self, key: str) -> list[str]:
        """All keys that the constructor of the node that holds this one takes."""
        owner, _ = self._owner(key)
        return [f"{owner}.{name}" for name in known_arguments(self.nodes[owner]["_target_"])] if owner else []

    def _owner(self, key: str) -> tuple[str | None, str]:
        """The innermost node with a target that holds the key, and the argument of the target that the key is in."""
        parts = key.split(".")
        for end in range(len(parts) - 1, 0, -1):
            node = self.nodes.get(".".join(parts[:end]), {})
            if not isinstance(node, dict):
                break
            if "_target_" in node:
                return ".".join(parts[:end]), parts[end]
        return None, ""


@functools.cache
def _options(config: str, search: tuple[str, ...], group: str, kind: ObjectType) -> tuple[str, ...]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        options = loader.get_group_options(group, kind, config, list(search))
    return tuple(option for option in options if not option.startswith("_"))  # base files of others


@functools.cache
def _listed(config: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """All keys of a config and of the nodes within, with their values."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose(config, list(overrides), return_hydra_config=True)
    return dict(_keys(OmegaConf.to_container(cfg, resolve=False)))


def _keys(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield f"{prefix}{key}", child
            yield from _keys(child, f"{prefix}{key}.")

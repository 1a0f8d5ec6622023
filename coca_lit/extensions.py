"""Installed projects, ours and other packages', and what each of them adds.

A project is a package folder named by an entry point of the group `coca_lit.projects`. Its file `project.toml` says
what it adds. Both are read without importing the project, whose code is imported when one of its names is asked for.

    about = "One sentence."        # required
    requires = ["other_project"]   # projects whose modules it imports
    usual_evals = ["my_score"]     # of its evals, those that evals=all takes
    rarely_tested = ["my_"]        # how evaluations begin whose data rarely have a test split
    groups = ["grid"]              # config groups of its own, of which nothing is chosen by default
    text_keys = ["data.notes"]     # keys of commands whose values are texts also where they look like numbers
    [roots]                        # folders of data sets: roots.NAME
    mine = "${data_dir}/mine"
    [presets]                      # models by name: a dictionary of them, and the names in it
    module = "my_package.presets:PRESETS"
    names = ["my_vit_b32"]
    [text_towers]                  # and the other tables of `TABLES`: name = "module:object"
    mine = "my_package.text:MyTower"
    [inputs]                       # endings of files of another kind of input, see `coca_lit.data.inputs`
    ".gif" = "my_package.moving:Reader"
    [input_options]                # arguments of these readers, keys of commands and of shards
    pictures = { reader = "my_package.moving:Reader", default = 4, help = "that the model sees of a moving picture" }
    [model_options]                # how models take such inputs: model.net.NAME, kept in checkpoints, see `ModelOption`
    order = { apply = "my_package.moving:set_order", default = "kept", evaluation = true, help = "of pictures" }
    [sample_steps]                 # arguments of data=laion, see `StepFactory` of `coca_lit.data.shards.training`
    notes = { step = "my_package.notes:reading", help = "folder of notes on the samples" }
    [batch_schedules]              # keys of data sets that ask for batches of another source, see `DeclaredSchedule`
    sounds = { schedule = "my_package.sounds:SoundsBetween", keys = ["data.sound_every", "model.sound_weight"] }
    [batch_sizes]                  # keys of data sets that plan sizes of batches, see `coca_lit.data.loader.Schedule`
    sizes = { schedule = "my_package.batches:BySize", help = "sizes of batches, one of which is drawn for each" }
    [scores]                       # last parts of names of scores; with "%" at its end, tables print it times 100
    right = { title = "right answers, %", share = true }  # or lower_is_better = true
    [commands.data]                # `coca-data count …` calls run(["count", …]); an option is declared as "--count"
    count = { run = "my_package.command:count", help = "what it does" }

Its folder `conf/` holds config groups, which Hydra finds as if they lay among ours.
"""

import functools
import importlib.util
import pkgutil
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from coca_lit.errors import ConfigError, check_names, suggest

GROUP = "coca_lit.projects"
MANIFEST = "project.toml"
OWN = "coca_lit"  # the distribution of the nucleus, whose projects take precedence
TABLES = {  # of "module:object" by name, but for the last, which holds texts
    "text_towers": "classes of text towers",
    "image_encoders": "classes of image encoders",
    "poolers": "classes of poolers",
    "init_parts": "functions that start a part of a network from a file, by the key init_parts.NAME",
    "objectives": "classes of objectives that are kept with the model",
    "open_clip": "how a part of a model is written in OpenCLIP's files, by a tensor that shows it",
    "vocabularies": "lists of words, for model.net.tokenizer",
    "scene_files": "functions that write built-in scenes in the files of a data set, by the name of their format",
    "inputs": "readers of files, by their ending",
    "resolvers": "functions that configs call, as ${name:argument}",
    "word_maps": "functions that say where in an image the words of its caption come from, for the demo",
    "word_map_samples": "functions that draw this for the report",
    "titles": "what readers call the other parts of names of scores: the evaluation, and how answers were found",
}


@dataclass(frozen=True)
class DeclaredArguments:
    """Beside the annotation of the last arguments of a constructor: those that projects declare are among them.

    Attributes:
        kind: a table of `project.toml` with their names.
    """

    kind: str


INPUT_OPTIONS = DeclaredArguments("input_options")
MODEL_OPTIONS = DeclaredArguments("model_options")
SAMPLE_STEPS = DeclaredArguments("sample_steps")
BATCH_SIZES = DeclaredArguments("batch_sizes")


@dataclass(frozen=True)
class Score:
    """What a name of scores means.

    Attributes:
        title: what readers call it; with "%" at its end, tables print the score times 100.
        share: whether it is a share of images, texts or answers, in [0, 1].
        group: under which heading of a table it stands, such as "classification".
    """

    title: str
    share: bool = False
    lower_is_better: bool = False
    group: str = "captions"


@dataclass(frozen=True)
class InputOption:
    """An argument of a reader of another kind of input.

    Attributes:
        reader: "module:class".
        default: of commands that read such inputs beside images; 0 or none stands for images alone.
    """

    reader: str
    default: Any
    help: str


@dataclass(frozen=True)
class ModelOption:
    """How a model takes another kind of input: an argument of every `CoCa`, which its checkpoints keep.

    Attributes:
        apply: "module:function" of a model and the value. It raises `ValueError` for a wrong value, and may add
            parameters, see `coca_lit.models.poolers.Pooling.add_parameter`.
        evaluation: whether it is also a key of coca-evaluate, which changes it in a trained model, a CLIP too.
    """

    apply: str
    default: Any
    evaluation: bool
    help: str


@dataclass(frozen=True)
class DeclaredStep:
    """A step that training on shards takes with each sample, where the argument of its name is given.

    Attributes:
        step: "module:function", a `StepFactory` of `coca_lit.data.shards.training`.
    """

    step: str
    help: str


@dataclass(frozen=True)
class DeclaredSchedule:
    """A schedule that gives batches of another source between batches of pairs. A project declares it by its name among
    the keys of data sets: with `data.NAME`, unless that is null, the class is called with this value as NAME.

    Attributes:
        schedule: "module:class" of a `BatchSchedule` of `coca_lit.data.batch_schedule`.
        keys: of data or model, such as "data.sound_every", whose last part names a further argument of the class.
    """

    schedule: str
    keys: Sequence[str]


@dataclass(frozen=True)
class DeclaredSizes:
    """A plan of the sizes of batches, where the argument of its name is given.

    Attributes:
        schedule: "module:class" of a `Schedule` of `coca_lit.data.loader`.
    """

    schedule: str
    help: str


@dataclass(frozen=True)
class DeclaredCommand:
    """A subcommand of a tool, such as "check", or an option, such as "--examples".

    Attributes:
        run: "module:function" of the words of the command.
    """

    run: str
    help: str


DECLARATIONS: dict[str, Callable[..., Any]] = {  # tables of objects by name; of commands there is one for each tool
    "scores": Score,
    "input_options": InputOption,
    "model_options": ModelOption,
    "sample_steps": DeclaredStep,
    "batch_schedules": DeclaredSchedule,
    "batch_sizes": DeclaredSizes,
    "commands": DeclaredCommand,
}
LISTS = ("requires", "usual_evals", "rarely_tested", "groups", "text_keys")
KEYS = ("about", *LISTS, "roots", "presets", *DECLARATIONS, *TABLES)


@dataclass(frozen=True)
class Project:
    """What is known of a project without importing it.

    Attributes:
        package: import path of its folder.
        distribution: name of the installed package that brings it.
        manifest: content of its `project.toml`.
    """

    name: str
    package: str
    folder: Path
    distribution: str
    manifest: Mapping[str, Any]

    @property
    def about(self) -> str:
        return str(self.manifest["about"])

    @property
    def is_own(self) -> bool:
        return self.distribution == OWN

    def kinds(self) -> list[str]:
        """The tables that it may have."""
        commands = [f"commands.{tool}" for tool in self.manifest.get("commands", {})]
        others = [kind for kind in DECLARATIONS if kind != "commands"]
        return ["roots", "presets", *TABLES, *others, *commands]

    def table(self, kind: str) -> dict[str, Any]:
        """What it declares of a kind: name -> "module:object", or an object of the class in `DECLARATIONS`.

        Raises:
            ValueError: an entry lacks a key, or has one that it cannot have.
        """
        group, _, tool = kind.partition(".")
        table = self.manifest.get(group, {})
        if tool:
            table = table.get(tool, {})
        if kind == "presets":
            return dict.fromkeys(table.get("names", ()), table.get("module"))
        if group not in DECLARATIONS:
            return dict(table)
        found: dict[str, Any] = {}
        for name, values in table.items():
            try:
                found[name] = DECLARATIONS[group](**values)
            except TypeError as error:
                raise ValueError(f"'{name}' of [{kind}]: {error}") from error
        return found


@functools.cache
def projects() -> tuple[Project, ...]:
    """All projects that can be used, ours first. One that cannot is left out, with a sentence on standard error."""
    found: dict[str, Project] = {}
    entries = sorted(entry_points(group=GROUP), key=lambda entry: (_distribution(entry) != OWN, entry.name))
    for entry in entries:
        try:
            project = _read(entry)
            _check_names(project, found)
        except (OSError, ValueError, TypeError, KeyError) as error:
            _leave_out(entry.name, _distribution(entry), str(error))
        else:
            found[project.name] = project
    while unmet := _unmet_requirement(found):
        project, required = unmet
        _leave_out(project.name, project.distribution, f"it requires the project '{required}'")
        del found[project.name]
    return tuple(found.values())


def _unmet_requirement(found: Mapping[str, Project]) -> tuple[Project, str] | None:
    """A project that requires one that is not there, and the name of that one."""
    for project in found.values():
        for required in project.manifest.get("requires", ()):
            if required not in found:
                return project, required
    return None


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "?"


def _leave_out(name: str, distribution: str, reason: str) -> None:
    print(f"note: the project '{name}' of the package '{distribution}' is left out: {reason}", file=sys.stderr)


def _read(entry: EntryPoint) -> Project:
    folder = _folder_of(entry.value)
    manifest = tomllib.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    check_names(str(folder / MANIFEST), manifest, KEYS)
    if "about" not in manifest:
        raise ValueError(f"{folder / MANIFEST} lacks the key 'about'")
    project = Project(entry.name, entry.value, folder, _distribution(entry), manifest)
    for kind in project.kinds():
        project.table(kind)
    return project


def _folder_of(package: str) -> Path:
    """The folder of a package, found without importing it."""
    top, *inner = package.split(".")
    spec = importlib.util.find_spec(top)
    places = (spec.submodule_search_locations or ()) if spec is not None else ()
    for place in places:
        folder = Path(place, *inner)
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"there is no folder of the package '{package}'")


def _check_names(project: Project, others: Mapping[str, Project]) -> None:
    """Raises `ValueError` for a name that another project has taken already."""
    if project.name in others:
        raise ValueError(f"the package '{others[project.name].distribution}' has a project of the same name")
    for other in others.values():
        for kind in project.kinds():
            twice = project.table(kind).keys() & other.table(kind).keys()
            if twice:
                raise ValueError(f"'{min(twice)}' of its {kind} is also the name of one of the project '{other.name}'")


@functools.cache
def declared(kind: str) -> dict[str, Any]:
    """What all projects declare of a kind, see `Project.table`."""
    return {name: entry for project in projects() for name, entry in project.table(kind).items()}


def scores() -> dict[str, Score]:
    """What all projects declare of names of scores, by their last part."""
    return declared("scores")


def input_options() -> dict[str, InputOption]:
    """What all projects declare of arguments of readers of other kinds of input, by name."""
    return declared("input_options")


def model_options() -> dict[str, ModelOption]:
    """What all projects declare of arguments of models for other kinds of input, by name."""
    return declared("model_options")


def sample_steps() -> dict[str, DeclaredStep]:
    """What all projects declare of steps for samples of shards, by the argument that asks for them."""
    return declared("sample_steps")


def batch_schedules() -> dict[str, DeclaredSchedule]:
    """What all projects declare of batch schedules, by the key of data sets that asks for each."""
    return declared("batch_schedules")


@functools.cache
def schedule_keys(part: str) -> dict[str, str]:
    """The keys in a part of a config, "data" or "model", that are arguments of batch schedules which projects declare:
    name -> "module:class" of the schedule.
    """
    found: dict[str, str] = {}
    for name, declared in batch_schedules().items():
        for key in (f"data.{name}", *declared.keys):
            owner, _, argument = key.rpartition(".")
            if owner == part:
                found[argument] = declared.schedule
    return found


def batch_sizes() -> dict[str, DeclaredSizes]:
    """What all projects declare of plans of sizes of batches, by the argument of data sets that chooses one."""
    return declared("batch_sizes")


def commands(tool: str) -> dict[str, DeclaredCommand]:
    """What all projects add to the command of a tool, by word."""
    return declared(f"commands.{tool}")


def listed(key: str) -> list[str]:
    """The names in a list of all projects, such as "usual_evals"."""
    return [name for project in projects() for name in project.manifest.get(key, ())]


def config_folders() -> list[Path]:
    """The folders with configs of projects."""
    return [project.folder / "conf" for project in projects() if (project.folder / "conf").is_dir()]


def load(target: str) -> Any:
    """The object "module:object" of a project, imported.

    Raises:
        ConfigError: it is not there.
    """
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"there is no '{target}' ({error}){where_to_get(target)}") from error


def where_to_get(target: str) -> str:
    """The end of a sentence about an object that is missing because its project is; else nothing."""
    module = target.partition(":")[0].removeprefix(f"{GROUP}.")
    name = module.partition(".")[0]
    known = [project.name for project in projects()]
    if module == target.partition(":")[0] or name in known:
        return ""
    return f"; the project '{name}' is not installed{suggest(name, known)} It comes with the package {OWN}"

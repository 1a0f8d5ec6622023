"""Scores of a checkpoint: `coca-evaluate checkpoint=PATH 'evals=[mscoco_captions,mscoco_retrieval]'`.

Training shares the evaluations (`conf/evals`). Under torchrun the images are split over the processes; the scores are
the same.
"""

import os
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig

from coca_lit.cli.assembly import build, build_evals, build_settings
from coca_lit.cli.command import explain, job_command, options_of
from coca_lit.cli.runtime import chosen_dtype, configure_libraries
from coca_lit.cli.schema import part_of, written
from coca_lit.cli.sweep import SWEEP_VARIABLE
from coca_lit.cli.words import quote
from coca_lit.errors import ConfigError, DataError, UserError, error_context
from coca_lit.extensions import listed, load, model_options
from coca_lit.machine import is_first_process
from coca_lit.reading import printable, read_run_yaml
from coca_lit.runs.redaction import redact
from coca_lit.runs.run_folder import CHECKPOINTS, CONFIG, in_use, start_run_folder

if TYPE_CHECKING:
    from coca_lit.evals import Evaluation, Settings
    from coca_lit.models import DualEncoder
    from coca_lit.runs.results import Found

MAX_NAMES = 300  # characters of names that a message repeats
_OWN = re.compile(r"evals\.[\w-]+(\._target_=.*|=\{.*)", re.DOTALL)
_FOLLOWS = re.compile(r"\$\{oc\.select:data\.(records\.)?")  # how evaluations refer to what the training data have
# How the names of evaluations of data begin that rarely have a test split; projects name others.
RARELY_TESTED = ("my_photos_",)


def evaluate() -> None:
    """Entry point of `coca-evaluate` and `python -m coca_lit.cli.evaluate`."""
    job_command("evaluate", run, with_evals)


class ScoredRun(NamedTuple):
    """A checkpoint, and what the config of its run says of its evaluations."""

    checkpoint: str
    config: Mapping[str, Any]
    known: list[str]  # evaluations that are options of the config group
    others: list[str]


def with_evals(words: list[str]) -> list[str]:
    """The overrides with the evaluations of the checkpoint's run, how it wrote captions, and where its data were,
    unless `evals` is given. Of the run's config only names of evaluations that are options here, existing folders, what
    they refer to in the training data, and plain options of `scoring.generate` count: it may be a stranger's.

    Raises:
        ConfigError: no evaluations are known: the checkpoint belongs to no run, or to one with only own evaluations.
    """
    given = {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in words)}
    if "evals" in given or "checkpoint" not in given:
        return words
    checkpoints = _values(f"checkpoint={given['checkpoint']}")
    if not checkpoints or not all(map(_exists, checkpoints)):
        return words  # a mistake, which is reported with the others
    known = options_of("evaluate", "evals", words)
    runs = [_scored_run(checkpoint, known) for checkpoint in checkpoints]
    notes = _notes_on_others(runs, given)
    names = list(dict.fromkeys(name for run in runs for name in run.known))
    added = [f"evals=[{','.join(names)}]"]
    # The user's options count alone: those of the run may belong to another strategy.
    if not any(key == "scoring" or f"{key}.".startswith("scoring.generate.") for key in given):
        generate, differences = _common_generate(runs)
        notes += differences
        if generate is not None:
            added.append(f"scoring.generate={generate}")
    places, differing = _common_places(runs)
    for key in differing:
        if key not in given:
            notes.append(f"the runs differ in {key}: all are scored with that of the first one, unless it is given")
    if names:
        notes.insert(0, f"scoring what the run scored: {' '.join(added)}")
    if notes and is_first_process():
        print(*dict.fromkeys(notes), sep="\n", flush=True)
    for key, place in places.items():
        if key not in given:
            added.append(f"{key}={quote(place) if isinstance(place, str) else place}")
    return [*words, *added]


def _exists(checkpoint: str) -> bool:
    """Whether it is the name of a model, or a file or folder."""
    from coca_lit.weights.hub import PHOTOS, PREFIX, released

    is_name = checkpoint == PHOTOS or checkpoint.startswith(PREFIX) or released(checkpoint) is not None
    return is_name or os.path.exists(os.path.expanduser(checkpoint))  # in quotes Hydra leaves a ~ as it is


def _scored_run(checkpoint: str, known: Collection[str]) -> ScoredRun:
    path = Path(os.path.expanduser(checkpoint))
    folder = next((place for place in (path, *path.parents[:2]) if os.path.isfile(place / CONFIG)), None)
    config = read_run_yaml(folder, CONFIG) if folder is not None else {}
    scored = [name for name, node in part_of(config, "evals").items() if node]
    others = [name for name in scored if name not in known]
    return ScoredRun(checkpoint, config, [name for name in scored if name in known], others)


def _notes_on_others(runs: Sequence[ScoredRun], given: Mapping[str, str]) -> list[str]:
    """What is said of the runs' own evaluations, which are not repeated unless the user builds them: by
    +evals.mine._target_=my_parts.my_score or +evals.mine={_target_: …}.

    Raises:
        ConfigError: a run has no other evaluations, and the user builds none.
    """
    built = {key.split(".")[1] for key, value in given.items() if _OWN.fullmatch(f"{key}={value}")}
    notes: list[str] = []
    for run in runs:
        note = (
            f"{run.checkpoint} belongs to no scored run: set evals=all or evals=[NAME,NAME], see coca-evaluate --help"
        )
        others = ", ".join(str(name) for name in run.others if name not in built)
        if others:
            note = (
                f"the run's own evaluations ({printable(others[:MAX_NAMES])}) are not repeated by themselves, as a "
                f"config may run code: add what its {CONFIG} has below evals.NAME, such as +evals.NAME._target_=…"
            )
            notes.append(note)
        if not run.known and not built:
            raise ConfigError(note)
    return notes


def _common_generate(runs: Sequence[ScoredRun]) -> tuple[str | None, list[str]]:
    """How the runs wrote captions, in Hydra's grammar, None for the default; and what is not taken over."""
    notes: list[str] = []
    found = [_generate(run.config) for run in runs]
    for run, generate in zip(runs, found, strict=True):
        if generate is None and part_of(run.config, "scoring").get("generate"):
            notes.append(f"{run.checkpoint}: scoring.generate holds more than plain options and is not taken over")
    if len(set(found)) > 1:
        notes.append("the runs differ in scoring.generate: captions are greedy unless it is given")
        return None, notes
    return found[0], notes


def _common_places(runs: Sequence[ScoredRun]) -> tuple[dict[str, str | int], list[str]]:
    """Keys of what the runs scored, with the values of the first run that has them; and those in which runs differ."""
    places: dict[str, str | int] = {}
    differing: list[str] = []
    for run in runs:
        for key, place in _places(run.config, run.known):
            if places.setdefault(key, place) != place:
                differing.append(key)
    return places, differing


def _values(override: str) -> list[str]:
    """The values of an override, of which a sweep has several and a quoted one may hold commas; none if Hydra cannot
    read it.
    """
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return []
    texts = value.list if isinstance(value, ChoiceSweep) else [value]
    return [text.text if isinstance(text, QuotedString) else str(text) for text in texts]


def _generate(config: Mapping[str, Any]) -> str | None:
    """How a run wrote captions, in Hydra's grammar; None for the default, and where a value is no plain option."""
    options = part_of(config, "scoring").get("generate")
    if not isinstance(options, dict) or not options:
        return None
    for name, value in options.items():  # `_target_` begins with no letter
        named = re.fullmatch(r"[A-Za-z]\w*", str(name), re.ASCII)
        if named is None or isinstance(value, dict | list) or "${" in str(value):
            return None
    texts = {name: quote(value) if isinstance(value, str) else written(value) for name, value in options.items()}
    return f"{{{', '.join(f'{name}: {text}' for name, text in texts.items())}}}"


def _places(config: Mapping[str, Any], evals: Sequence[str]) -> Iterator[tuple[str, str | int]]:
    """Keys of what a run scored: the folders of data, the split of data that rarely have a test split, and what follows
    the training data.
    """
    data, roots = part_of(config, "data"), part_of(config, "roots")
    split = part_of(config, "scoring").get("split")
    rarely_tested = (*RARELY_TESTED, *listed("rarely_tested"))
    if split in ("train", "val") and all(name.startswith(rarely_tested) for name in evals):
        yield "scoring.split", split
    folders = {"data_dir": config.get("data_dir")}
    for name, root in roots.items():
        if any(evaluation.startswith(f"{name}_") for evaluation in evals):
            folders[f"roots.{name}"] = data.get("root") if root == "${data.root}" else root
    for key, folder in folders.items():
        if isinstance(folder, str) and os.path.isdir(folder):
            yield key, folder
    for name, part in product(evals, ("records", "images")):
        node = part_of(part_of(part_of(config, "evals"), name), part)
        for key, reference in node.items():
            follows = _FOLLOWS.match(str(reference))
            if follows is None or not re.fullmatch(r"[a-z]\w*", str(key), re.ASCII):
                continue
            value = (part_of(data, "records") if follows[1] else data).get(key)
            is_place = isinstance(value, str) and (os.path.exists(value) or (key, value) == ("classes", "imagenet"))
            if is_place or isinstance(value, int):
                yield f"evals.{name}.{part}.{key}", cast(str | int, value)


def run(cfg: DictConfig) -> dict[str, float]:
    """Scores as configured and returns the scores; the run folder is `cfg.output_dir`."""
    from coca_lit.distributed import process_group, rank
    from coca_lit.metrics.java.spice import JARS_VARIABLE
    from coca_lit.models import part_sizes
    from coca_lit.models.cost import forward_flops
    from coca_lit.models.generation.state import check_options
    from coca_lit.runs.results import Found, finish_run

    configure_libraries(cfg.threads)
    if cfg.spice_jars is not None:
        os.environ[JARS_VARIABLE] = cfg.spice_jars
    folder = Path(cfg.output_dir)
    with in_use(folder), process_group() as device:
        if (folder / CHECKPOINTS).exists():
            raise ConfigError(f"{folder} holds the checkpoints of a training run: choose another name")
        model = _load(cfg).to(device, chosen_dtype(cfg.precision))
        settings = build_settings(cfg)
        with error_context("scoring.generate"):
            check_options(model, settings.generate or {})
        evals, not_run = build_evals(cfg)
        report = build(cfg.report, "report") if cfg.report is not None else None
        for objective in getattr(model, "objectives", {}).values():
            objective.to(device)
        start_run_folder(cfg)  # not before: a scoring that cannot start leaves nothing behind
        found = Found(not_run=not_run)
        error = _score(evals, model, settings, found)
        if rank() == 0 and (error is None or found.scores):
            size = {"parameters": part_sizes(model), "gflops": forward_flops(model) / 1e9}
            finish_run(folder, found, size, report)
        is_bug = error is not None and not isinstance(error, UserError)
        # A sweep has no scores of a job that fails: there, some scores are enough.
        if error is not None and (is_bug or not found.scores or not os.environ.get(SWEEP_VARIABLE)):
            raise DataError(_in_words(error)) from error
    return found.scores


def _score(
    evals: "Sequence[Evaluation]", model: "DualEncoder", settings: "Settings", found: "Found"
) -> Exception | None:
    """Adds the scores of all evaluations to `found`; where one fails, the others still run, unless other processes wait
    for it. Returns the error, a bug first.
    """
    from coca_lit.data.prefetch import worker_errors
    from coca_lit.distributed import world_size

    errors: list[Exception] = []
    for evaluation in evals:
        try:
            with worker_errors():
                found.add(evaluation, evaluation.evaluate(model, settings))
        except Exception as error:  # also of an evaluation of one's own, after hours of others
            if len(evals) == 1 or world_size() > 1:
                raise
            if not isinstance(error, UserError):
                print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
            errors.append(error)
            name = f"{evaluation.name} ({type(evaluation).__name__})"  # captions and retrieval may share the first
            found.not_run[name] = _in_words(error)
            print(f"{name} not run: {found.not_run[name]}; the scores of the others stay", flush=True)
    bugs = [error for error in errors if not isinstance(error, UserError)]
    return next(iter([*bugs, *errors]), None)


def _in_words(error: Exception) -> str:
    return printable(redact(explain(error)))


def _load(cfg: DictConfig) -> "DualEncoder":
    from coca_lit.models import CoCa
    from coca_lit.weights.computation import interpolate
    from coca_lit.weights.load import load_dual_encoder

    if cfg.interpolate_with is None and cfg.weight != 0.5:
        raise ConfigError("weight belongs to interpolate_with=OTHER: leave it out, or name the other weights")
    with error_context("checkpoint"):
        model = load_dual_encoder(cfg.checkpoint, cfg.quick_gelu)
    if cfg.interpolate_with is not None:
        with error_context("interpolate_with"):
            interpolate(model, load_dual_encoder(cfg.interpolate_with, cfg.quick_gelu), cfg.weight)
    if cfg.image_size is not None:
        with error_context("image_size"):
            model.set_image_size(cfg.image_size)
    cfg.image_size = model.image_size
    for name, option in model_options().items():
        if option.evaluation and cfg[name] is not None:
            with error_context(name):
                if isinstance(model, CoCa):
                    model.set_option(name, cfg[name])
                else:
                    load(option.apply)(model, cfg[name])
    return model


if __name__ == "__main__":
    evaluate()

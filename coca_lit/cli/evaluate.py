"""Scores of a checkpoint: `coca-evaluate checkpoint=PATH 'evals=[mscoco_captions,mscoco_retrieval]'`.

Training shares the evaluations (`conf/evals`). Under torchrun the images are split over the processes; the scores are
the same.
"""

import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
from coca_lit.machine import is_first_process
from coca_lit.reading import printable, read_run_yaml
from coca_lit.runs.redaction import redact
from coca_lit.runs.run_folder import CHECKPOINTS, CONFIG, in_use, start_run_folder

if TYPE_CHECKING:
    from coca_lit.models import DualEncoder

MAX_NAMES = 300  # characters of names that a message repeats
_OWN = re.compile(r"evals\.[\w-]+(\._target_=.*|=\{.*)", re.DOTALL)
# What evaluations read as the training does: frames of a clip, the split 1k-A of MSR-VTT, Karpathy's file of MS-COCO,
# names of classes, the folder of SNLI-VE's photos.
FOLLOWING = ("frames", "one_thousand", "karpathy", "classes", "images")
# How the names of evaluations of data begin that rarely have a test split: one's own, and Kinetics.
RARELY_TESTED = ("my_photos_", "my_clips_", "kinetics_", "classes_", "pairs_")
# How the names of evaluations end.
KINDS = ("captions", "retrieval", "zeroshot", "choice", "probe", "answers", "judgments", "labels")


def evaluate() -> None:
    """Entry point of `coca-evaluate` and `python -m coca_lit.cli.evaluate`."""
    job_command("evaluate", run, with_evals)


def with_evals(words: list[str]) -> list[str]:
    """The overrides with the evaluations of the checkpoint's run, how it wrote captions, and where their data were,
    unless `evals` is given. Of the run's config only names of our evaluations, existing folders, the `FOLLOWING` of its
    data and plain options of `scoring.generate` count: it may be a stranger's.

    Raises:
        ConfigError: no evaluations are known: the checkpoint belongs to no run, or to one with only own evaluations.
    """
    given = {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in words)}
    if "evals" in given or "checkpoint" not in given:
        return words
    from coca_lit.weights.hub import PHOTOS, PREFIX, released

    known = options_of("evaluate", "evals", words)
    # Evaluations that the user builds: +evals.mine._target_=my_parts.my_score, or +evals.mine={_target_: …}.
    built = {key.split(".")[1] for key, value in given.items() if _OWN.fullmatch(f"{key}={value}")}
    # The user's options count alone: those of the run may belong to another strategy.
    decoding_given = any(key == "scoring" or f"{key}.".startswith("scoring.generate.") for key in given)
    names: list[str] = []
    places: dict[str, str | int] = {}
    generates: set[str | None] = set()
    notes: list[str] = []
    checkpoints = _values(f"checkpoint={given['checkpoint']}")
    if not checkpoints:
        return words
    for checkpoint in checkpoints:
        path = Path(os.path.expanduser(checkpoint))  # in quotes Hydra leaves a ~ as it is
        is_name = checkpoint == PHOTOS or checkpoint.startswith(PREFIX) or released(checkpoint) is not None
        if not is_name and not os.path.exists(path):
            return words  # a mistake, which is reported with the others
        folder = next((place for place in (path, *path.parents[:2]) if os.path.isfile(place / CONFIG)), None)
        config = read_run_yaml(folder, CONFIG) if folder is not None else {}
        evals = part_of(config, "evals")
        scored = [name for name in evals if name in known and evals[name]]
        own = [name for name in evals if name not in known and name not in built and evals[name]]
        if own:
            named = printable(", ".join(map(str, own))[:MAX_NAMES])
            notes.append(
                f"the run's own evaluations ({named}) are not repeated by themselves, as a config may run code: "
                f"add what its {CONFIG} has below evals.NAME, such as +evals.NAME._target_=…"
            )
        if not scored and not built:
            raise ConfigError(
                notes[-1]
                if own
                else f"{checkpoint} belongs to no scored run: name what to score, evals=all or evals=[NAME,NAME] of "
                f"coca-evaluate --help, such as {_grouped(known)}"
            )
        names += scored
        for key, place in _places(config, scored):
            if places.setdefault(key, place) != place and key not in given:
                notes.append(f"the runs differ in {key}: all are scored with that of the first one, unless it is given")
        if not decoding_given:
            generates.add(generate := _generate(config))
            if generate is None and part_of(config, "scoring").get("generate"):
                notes.append(f"{checkpoint}: scoring.generate holds more than plain options and is not taken over")
    added = [f"evals=[{','.join(dict.fromkeys(names))}]"]
    if len(generates) > 1:
        notes.append("the runs differ in scoring.generate: captions are greedy unless it is given")
    elif generate := next(iter(generates), None):
        added.append(f"scoring.generate={generate}")
    if names:
        notes.insert(0, f"scoring what the run scored: {' '.join(added)}")
    if notes and is_first_process():
        print(*dict.fromkeys(notes), sep="\n", flush=True)
    kept = {key: quote(of) if isinstance(of, str) else str(of) for key, of in places.items() if key not in given}
    return [*words, *added, *(f"{key}={value}" for key, value in kept.items())]


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
    split = part_of(config, "scoring").get("split")
    if split in ("train", "val") and all(name.startswith(RARELY_TESTED) for name in evals):
        yield "scoring.split", split
    roots, data = part_of(config, "roots"), part_of(config, "data")
    found = {"data_dir": config.get("data_dir")}
    found |= {f"roots.{name}": roots[name] for name in roots if any(own.startswith(f"{name}_") for own in evals)}
    for key, place in found.items():
        place = data.get("root") if place == "${data.root}" else place
        if isinstance(place, str) and os.path.isdir(place):
            yield key, place
    for name, part, key in product(evals, ("records", "images"), FOLLOWING):
        follows = str(part_of(part_of(part_of(config, "evals"), name), part).get(key))
        if follows.startswith("${oc.select:data."):
            value = (part_of(data, "records") if follows.startswith("${oc.select:data.records.") else data).get(key)
            is_place = isinstance(value, str) and (os.path.exists(value) or (key, value) == ("classes", "imagenet"))
            if is_place or isinstance(value, int):
                yield f"evals.{name}.{part}.{key}", cast(str | int, value)


def _grouped(names: Sequence[str]) -> str:
    """Evaluations by kind: scenes_captions, mscoco_captions -> "{mscoco,scenes}_captions"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        data, _, kind = name.rpartition("_")
        if kind in KINDS and data:
            groups.setdefault(kind, []).append(data)
    return ", ".join(f"{{{','.join(sorted(data))}}}_{kind}" for kind, data in groups.items())


def run(cfg: DictConfig) -> dict[str, float]:
    """Scores as configured and returns the scores; the run folder is `cfg.output_dir`."""
    from coca_lit.data.prefetch import worker_errors
    from coca_lit.distributed import process_group, rank, world_size
    from coca_lit.metrics.java.spice import JARS_VARIABLE
    from coca_lit.models import CoCa, part_sizes
    from coca_lit.models.cost import forward_flops
    from coca_lit.models.generation.state import check_options
    from coca_lit.runs.results import Found, finish_run
    from coca_lit.training.classifiers import load_classifier

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
        if isinstance(model, CoCa) and any(evaluation.classified for evaluation in evals):
            with error_context("checkpoint"):
                settings = replace(settings, classifier=load_classifier(cfg.checkpoint, model))
        start_run_folder(cfg)  # not before: a scoring that cannot start leaves nothing behind
        found, problem = Found(not_run=not_run), None
        bug: Exception | None = None
        for evaluation in evals:
            try:
                with worker_errors():
                    found.add(evaluation, evaluation.evaluate(model, settings))
            except Exception as error:  # also of an evaluation of one's own, after hours of others
                if len(evals) == 1 or world_size() > 1:  # other processes would wait for this one
                    raise
                said = printable(redact(explain(error)))
                if not isinstance(error, UserError):
                    bug = error
                    print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
                problem = said if bug in (None, error) else problem
                name = f"{evaluation.name} ({type(evaluation).__name__})"  # captions and retrieval may share the first
                found.not_run[name] = said
                print(f"{name} not run: {said}; the scores of the others stay", flush=True)
        if problem and not found.scores:
            raise DataError(problem) from bug
        if rank() == 0:
            facts = {"parameters": part_sizes(model), "gflops": forward_flops(model) / 1e9}
            finish_run(folder, found, facts, report)
        if problem and (bug or not os.environ.get(SWEEP_VARIABLE)):  # a sweep has no scores of a job that fails
            raise DataError(problem) from bug
    return found.scores


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
    if cfg.frame_pooling is not None:
        with error_context("frame_pooling"):
            if isinstance(model, CoCa):
                model.set_frame_pooling(cfg.frame_pooling)
            elif cfg.frame_pooling != "mean":
                raise ValueError("a CLIP embeds a clip as the mean of its frames: leave it out")
    return model


if __name__ == "__main__":
    evaluate()

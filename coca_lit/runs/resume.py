"""How the same command resumes a run: at the newest whole checkpoint of its folder.

A resumed run must be the same run, so config keys that its result depends on may not have changed. Checkpoints are
written by `coca_lit.callbacks.checkpoint`; the place in the data is found again by `coca_lit.data.loader`.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from coca_lit.distributed import print_rank_zero
from coca_lit.errors import CheckpointError, DataError
from coca_lit.files import atomic_link, write_json
from coca_lit.machine import in_shell, is_first_process
from coca_lit.reading import read_json
from coca_lit.runs.checkpoint_io import inspect, newest_valid
from coca_lit.runs.redaction import masked_yaml
from coca_lit.runs.run_folder import (
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    JOBS,
    NEWEST,
    RESULTS,
    check_links,
    command,
    is_of_run,
    restarted,
    step_files,
)
from coca_lit.weights.sharded import is_checkpoint

RUN_KEY = "coca_lit_run"  # under which our checkpoints keep what resuming needs: see `coca_lit.callbacks.checkpoint`
LOOPS = "loops"  # where Lightning's checkpoints keep how far a training has come
LAST = "last.ckpt"
# Keys that decide what is computed: a run that resumes has them as before.
IDENTITY = (
    *("seed", "image_size", "vocabulary", "ema", "lora", "init_from", "init_parts"),
    *("model", "data", "trainer", "callbacks"),
)
CALLBACK_KEYS = ("step_seeds", "non_finite_guard")
TRAINER_KEYS = ("accumulate_grad_batches", "gradient_clip_val", "limit_train_batches")
# Keys among them that only decide where and how fast.
FREE = (
    *("data.num_workers", "data.root", "data.records.root", "data.max_bad_fraction", "data.store_patience"),
    *("data.cache_dir", "data.cache_gb"),
    *("model.grad_checkpointing", "model.compile"),
    "model.net.cls_mask",  # null: the checkpoint's, and no other is accepted
)


class ResumePoint(NamedTuple):
    """The checkpoint that a run resumes from, read once.

    Attributes:
        content: as `inspect` returns it.
    """

    path: Path
    content: dict[str, Any]

    @property
    def run(self) -> dict[str, Any]:
        """What resuming needs; nothing if the checkpoint is not one of ours."""
        return self.content.get(RUN_KEY, {})

    def lies_in(self, folder: Path) -> bool:
        """Whether the checkpoint is one of this run folder."""
        return self.path.resolve().parent == (folder / CHECKPOINTS).resolve()


def identity_of(config: dict[str, Any]) -> dict[str, Any]:
    """The part of an unresolved config that may not change within a run."""
    part = {key: config[key] for key in IDENTITY if key in config}
    for group, keys in (("trainer", TRAINER_KEYS), ("callbacks", CALLBACK_KEYS)):
        part[group] = {key: value for key, value in config[group].items() if key in keys}
    return part


def find_checkpoint(folder: Path, ckpt_path: str | None, first_process: bool) -> ResumePoint | None:
    """The checkpoint to resume from, None for a fresh start.

    Only the first process of a run compares checksums. The others read the settings of the newest checkpoint that they
    can read; which file `last.ckpt` names is decided when `fit` loads it.

    Args:
        folder: the run folder.
        ckpt_path: "auto" for the newest whole one in the run folder, a path, or None.

    Raises:
        CheckpointError: the path names no usable checkpoint, or the folder has none that is whole.
        ConfigError, DataError: see `check_links`.
    """
    if ckpt_path is None:
        return None
    if ckpt_path != NEWEST:
        path = Path(os.path.expanduser(ckpt_path))
        if not is_checkpoint(path):
            why = ": it is a folder; name the checkpoint in it" if path.is_dir() else ""
            raise CheckpointError(f"ckpt_path: there is no checkpoint '{ckpt_path}'{why}")
        content = inspect(path, checksums=first_process)
        if LOOPS not in content:  # weights alone, such as OpenCLIP's epoch_3.pt
            raise CheckpointError(
                f"ckpt_path: no training can resume from '{ckpt_path}', which is none of Lightning's checkpoints: "
                f"init_from={ckpt_path} takes its weights"
            )
        return ResumePoint(path, content)
    check_links(folder)
    last = folder / CHECKPOINTS / LAST
    if not step_files(last.parent):
        return None
    if first_process:
        path, content = newest_valid(last.parent)
        if not last.exists() or last.resolve() != path.resolve():
            atomic_link(last, path)
        return ResumePoint(last, content)
    # The first process may be about to replace the link, which then points to a damaged file or to none.
    for path in (last, *step_files(last.parent)):
        with suppress(CheckpointError):
            return ResumePoint(last, inspect(path, checksums=False))
    raise CheckpointError(f"none of the checkpoints in {last.parent} can be read")


def is_requeued(folder: Path) -> bool:
    """Whether SLURM or torchrun has started this job again, and the run has checkpoints of its earlier starts. The
    command still has its `ckpt_path`, which was used at the first start: now the newest checkpoint counts. All
    processes find the same, since the first one records the job only after it has moved away earlier checkpoints.
    """
    jobs = restarted()
    if not jobs or not step_files(folder / CHECKPOINTS):
        return False
    try:
        begun_by = read_json(folder / ENVIRONMENT, dict).get(JOBS)
    except DataError:  # there is none
        return False
    return isinstance(begun_by, dict) and any(name in begun_by and begun_by[name] == os.environ[name] for name in jobs)


def forget_earlier_jobs(folder: Path) -> None:
    """At the first start of a job: drops what earlier jobs of the same id recorded, as torchrun uses ids again."""
    if restarted() or not is_first_process() or not is_of_run(folder):
        return
    known = read_json(folder / ENVIRONMENT, dict)
    if known.pop(JOBS, None) is not None:
        write_json(folder / ENVIRONMENT, known)


def check_same_run(
    start: ResumePoint, identity: dict[str, Any], strict: bool, defaults: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Compares the config that a checkpoint was written with and that of the run that is about to resume from it.

    Args:
        identity: of the run, see `identity_of`.
        strict: refuse a changed config; otherwise print a note.
        defaults: the values of keys that a config need not list.

    Raises:
        CheckpointError: the config has changed.
    """
    before = start.run.get("config")
    if before is None:  # it is not one of ours
        return
    changes = list(changed_keys(_filled(before, defaults), _filled(identity, defaults)))
    if not changes:
        return
    (key, old, new), others = changes[0], len(changes) - 1
    more = f" (and {others} more {'key' if others == 1 else 'keys'})" if others else ""
    changed = f"{key} was {old!r} when {start.path} was written and is now {new!r}{more}"
    if strict:
        raise CheckpointError(
            f"{changed}: that is another run, so give it another name; or set ckpt_path={start.path.resolve()} to "
            "resume all the same, ckpt_path=null to start fresh, init_from=FILE to take the weights alone"
        )
    print_rank_zero(f"note: {changed}")


def is_same_run(cfg: DictConfig, start: ResumePoint | None) -> bool:
    """Whether this is the run that the folder holds: it goes on at its checkpoint, or begins again with the same config
    because it died before its first one.
    """
    config = Path(cfg.output_dir) / CONFIG
    unchanged = config.is_file() and config.read_bytes() == masked_yaml(cfg).encode()
    return cfg.ckpt_path == NEWEST and (start is not None or unchanged)


def finished_results(cfg: DictConfig, start: ResumePoint) -> dict[str, float] | None:
    """The scores of a run that is finished and was scored as `cfg` asks for; None if there is something left to do.

    A full disk may have cost the last checkpoint, and a kill the report: then there is.
    """
    folder = Path(cfg.output_dir)
    results = folder / RESULTS
    config = folder / CONFIG
    if (
        cfg.ckpt_path != NEWEST
        or not results.exists()
        or not config.exists()
        or (cfg.report is not None and not (folder / "report.html").exists())
        or not start.run.get("finished")
    ):
        return None
    before = OmegaConf.load(config)
    now = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    for read in (before, now):
        OmegaConf.update(read, "scoring.objective", None)  # which ranks the scores and computes none
    keys = ("evals", "scoring", "trainer.max_epochs", "trainer.max_steps", "trainer.max_time")
    if any(OmegaConf.select(before, key) != OmegaConf.select(now, key) for key in keys):
        return None
    scores = read_json(results, dict)
    if is_first_process():
        os.utime(results)  # a sweep counts a job as done by the time of its results
        print(f"this run is finished, its scores are in {results}; ckpt_path=null trains again", flush=True)
    return scores


def changed_keys(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, before, now) of all values that differ between two nested configs, except those in `FREE`."""
    if key in FREE:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            yield from changed_keys(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now


def _filled(config: Any, defaults: Any) -> Any:
    """A nested config with the defaults of the keys that it does not list."""
    if not isinstance(config, dict) or not isinstance(defaults, Mapping):
        return config
    return {**defaults, **{key: _filled(value, defaults.get(key)) for key, value in config.items()}}


def resume_command(name: str, folder: Path) -> str:
    """The command that resumes this run: the same one, with the name that the run was given, and without the checkpoint
    that it began with once it has one of its own.
    """
    words = sys.argv[1:]
    if step_files(folder / CHECKPOINTS):
        words = [word for word in words if not word.lstrip("+").startswith("ckpt_path=")]
    named = any(word.startswith("name=") for word in words)
    return command(words) if named else f"{command(words)} {in_shell([f'name={name}'])}"

"""Where a run begins: at step 0, or at the newest whole checkpoint of its folder, with its logs rewound to that step.

A resumed run must be the same run, so config keys that its result depends on may not have changed.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from coca_lit.distributed import print_rank_zero
from coca_lit.errors import CheckpointError
from coca_lit.files import atomic_link
from coca_lit.runs.checkpoint_io import inspect, newest_valid, step_files
from coca_lit.runs.draws import DRAWS, INTERVALS
from coca_lit.runs.logs import BAD_STEPS, METRICS, rewind
from coca_lit.weights.sharded import is_checkpoint

RUN_KEY = "coca_lit_run"  # under which our checkpoints keep what resuming needs: see `coca_lit.callbacks.checkpoint`
FORMAT = 2  # of what is kept there; counted up when config keys get other names
AUTO = "auto"
CHECKPOINTS, LAST = "checkpoints", "last.ckpt"
# What belongs to one run, as outputs/README.md lists it.
FILES = (
    *("config.yaml", "environment.json", "results.json", "not_run.json", "curves.png", "report.html", "report.md"),
    *(INTERVALS, DRAWS, CHECKPOINTS, METRICS, BAD_STEPS, "bad_samples", "predictions", "samples", "tensorboard"),
    *("wandb", "wandb_run", "mlflow_run"),
)
# Keys that decide what is computed, and among them those that only decide where and how fast.
RESUME_KEYS = (
    *("seed", "image_size", "vocabulary", "ema", "lora", "init_from", "init_parts"),
    *("model", "data", "trainer", "callbacks"),
)
CALLBACK_KEYS = ("step_seeds", "non_finite_guard")
TRAINER_KEYS = ("accumulate_grad_batches", "gradient_clip_val", "limit_train_batches")
FREE = (
    *("data.num_workers", "data.root", "data.records.root", "data.max_bad_fraction", "data.store_patience"),
    *("data.cache_dir", "data.cache_gb"),
    *("model.grad_checkpointing", "model.compile"),
    "callbacks.non_finite_guard.output_dir",  # in checkpoints of earlier versions
    "model.net.cls_mask",  # null: the checkpoint's, and no other is accepted
)


def resume_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The part of an unresolved config that may not change within a run."""
    part = {key: config[key] for key in RESUME_KEYS if key in config}
    for group, keys in (("trainer", TRAINER_KEYS), ("callbacks", CALLBACK_KEYS)):
        part[group] = {key: value for key, value in config[group].items() if key in keys}
    return part


def find_checkpoint(folder: Path, ckpt_path: str | None, first_process: bool) -> Path | None:
    """The checkpoint to resume from, None for a fresh start.

    Only the first process of a run reads the files; all others rely on the link `last.ckpt` that it leaves.

    Args:
        folder: the run folder.
        ckpt_path: "auto" for the newest whole one in the run folder, a path, or None.

    Raises:
        CheckpointError: the path names no usable checkpoint, or the folder has none that is whole.
    """
    if ckpt_path is None:
        return None
    if ckpt_path != AUTO:
        if not is_checkpoint(Path(ckpt_path)):
            why = ": it is a folder; name the checkpoint in it" if Path(ckpt_path).is_dir() else ""
            raise CheckpointError(f"ckpt_path: there is no checkpoint '{ckpt_path}'{why}")
        return Path(ckpt_path)
    last = folder / CHECKPOINTS / LAST
    if not step_files(last.parent):
        return None
    if first_process:
        found = newest_valid(last.parent)
        assert found is not None
        if not last.exists() or last.resolve() != found[0].resolve():
            atomic_link(last, found[0])
    return last


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds under `RUN_KEY`; nothing if it is not one of ours.

    Raises:
        CheckpointError: the file is not whole.
    """
    run: dict[str, Any] = inspect(checkpoint).get(RUN_KEY, {})
    return run


def check_same_run(
    checkpoint: Path, config: dict[str, Any], strict: bool, defaults: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Compares the config that a checkpoint was written with and that of the run that is about to resume from it.

    Args:
        config: the `resume_keys` of the run.
        strict: refuse a changed config; otherwise print a note.
        defaults: the values of keys that a config need not list.

    Raises:
        CheckpointError: the file is not whole, or the config has changed.
    """
    run = read_run(checkpoint)
    before = _renamed(run.get("config", {}))  # may lack a group that was not compared when it was written
    now, known = ({key: part[key] for key in before if key in part} for part in (config, defaults))
    if run and run.get("format", 1) != FORMAT:
        changed = f"{checkpoint} was written by another version of coca_lit, whose config has other keys"
    elif changes := list(changed_keys(_filled(before, known), _filled(now, known))):
        (key, old, new), others = changes[0], len(changes) - 1
        more = f" (and {others} more keys)" if others else ""
        changed = f"{key} was {old!r} when {checkpoint} was written and is now {new!r}{more}"
    else:
        return
    if strict:
        raise CheckpointError(
            f"{changed}: that is another run, so give it another name; or set ckpt_path={checkpoint.resolve()} to "
            "resume all the same, ckpt_path=null to start fresh, init_from=FILE to take the weights alone"
        )
    print_rank_zero(f"note: {changed}")


def resume(folder: Path, checkpoint: Path, roll_back: bool) -> None:
    """Prepares the run folder for resuming from `checkpoint`: its logs end there.

    Args:
        roll_back: the checkpoint was named, so newer ones in the folder are abandoned.
    """
    checkpoint = checkpoint.resolve()
    if checkpoint.parent != (folder / CHECKPOINTS).resolve():
        start_fresh(folder)
        return
    run = read_run(checkpoint)
    step = run.get("step", 0)
    newer = [path for path in step_files(folder / CHECKPOINTS) if int(path.stem.removeprefix("step_")) > step]
    if newer and roll_back:
        print_rank_zero(f"{len(newer)} newer checkpoints were moved to {archive(folder, newer)}")
    rewind(folder, run.get("logged_steps", 0), step, run.get("validating", False))


def start_fresh(folder: Path) -> None:
    """Empties a run folder without losing anything: what an earlier run left there is archived."""
    left = [folder / name for name in FILES if (folder / name).exists()]
    if step_files(folder / CHECKPOINTS) or (folder / "results.json").exists():
        print_rank_zero(f"the earlier run in {folder} was moved to {archive(folder, left)}")
    else:
        rewind(folder, 0, 0)  # it died before its first checkpoint, and the same steps are repeated


def archive(folder: Path, files: list[Path]) -> Path:
    """Moves files of a run into a new folder `earlier_N` within it."""
    number = 1
    while (target := folder / f"earlier_{number}").exists():
        number += 1
    for path in files:
        (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target / path.relative_to(folder))
    return target


def changed_keys(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, before, now) of all values that differ between two nested configs, except those in `FREE`."""
    if key in FREE:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            yield from changed_keys(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config in a checkpoint of an earlier version of this `FORMAT`, with the names that its keys have now."""
    config = dict(config)
    if "image_weights" in config:
        config["init_parts"] = {"image_encoder": config.pop("image_weights")}
    if "contrastive" in (model := dict(config.get("model", {}))):
        config["model"] = model | {"net": model["net"] | {"contrastive": model.pop("contrastive")}}
    return config


def _filled(config: Any, defaults: Any) -> Any:
    """A nested config with the defaults of the keys that it does not list."""
    if not isinstance(config, dict) or not isinstance(defaults, Mapping):
        return config
    return {**defaults, **{key: _filled(value, defaults.get(key)) for key, value in config.items()}}

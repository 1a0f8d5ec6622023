"""Where a run begins: anew, or at the newest whole checkpoint of its folder, with its logs wound back to that moment.

A run that goes on must be the run that it was, so keys on which the result depends may not have changed.
"""

import csv
import json
import os
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from coca_lit.distributed import print_rank_zero
from coca_lit.errors import CheckpointError
from coca_lit.files import atomic_symlink, atomic_write, csv_line, whole_lines
from coca_lit.runs.checkpoint_io import inspect, newest_valid, step_files

RUN_KEY = "coca_lit_run"  # where our checkpoints keep what a run needs to go on: see `coca_lit.callbacks.checkpoint`
AUTO = "auto"
CHECKPOINTS, LAST, METRICS, BAD_STEPS = "checkpoints", "last.ckpt", "metrics.csv", "bad_steps.jsonl"
# What belongs to one run, as outputs/README.md lists it.
FILES = (
    *("config.yaml", "environment.json", "results.json", "not_run.json", "curves.png", "report.html", "report.md"),
    *(CHECKPOINTS, METRICS, BAD_STEPS, "bad_samples", "predictions", "samples", "tensorboard"),
)
# Keys that decide what is computed, but for those which only say where and how fast.
DECISIVE = ("seed", "image_size", "vocabulary", "ema", "lora", "model", "data", "trainer")
DECISIVE_OF_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "limit_train_batches")
FREE = (
    *("data.num_workers", "data.root", "data.max_bad_fraction", "data.cache_dir", "data.cache_gb"),
    *("model.grad_checkpointing", "model.compile"),
)


def resume_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The part of an unresolved config that may not change within a run."""
    part = {key: config[key] for key in DECISIVE if key in config}
    part["trainer"] = {key: value for key, value in config["trainer"].items() if key in DECISIVE_OF_TRAINER}
    return part


def find_checkpoint(folder: Path, ckpt_path: str | None, first_process: bool) -> Path | None:
    """The checkpoint to go on from, None for a new start.

    Only the first process of a run looks into the files; all others rely on what it leaves as `last.ckpt`.

    Args:
        folder: the run folder.
        ckpt_path: "auto" for the newest whole one in the run folder, a path, or None.

    Raises:
        CheckpointError: the path names no usable checkpoint, or the folder has none that is whole.
    """
    if ckpt_path is None:
        return None
    if ckpt_path != AUTO:
        if not Path(ckpt_path).is_file():
            why = ": it is a folder; name the file" if Path(ckpt_path).is_dir() else ""
            raise CheckpointError(f"ckpt_path: there is no checkpoint '{ckpt_path}'{why}")
        return Path(ckpt_path)
    last = folder / CHECKPOINTS / LAST
    if not step_files(last.parent):
        return None
    if first_process:
        found = newest_valid(last.parent)
        assert found is not None
        if not last.exists() or last.resolve() != found[0].resolve():
            atomic_symlink(last, found[0])
    return last


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its run; nothing if it is not one of ours.

    Raises:
        CheckpointError: the file is not whole.
    """
    run: dict[str, Any] = inspect(checkpoint).get(RUN_KEY, {})
    return run


def check_same_run(checkpoint: Path, config: dict[str, Any], strict: bool) -> None:
    """Compares the config that a checkpoint was written with and the one that is to go on from it.

    Args:
        config: what `resume_keys` gives for the run that is about to go on.
        strict: refuse a changed config; otherwise only say so.

    Raises:
        CheckpointError: the file is not whole, or the config has changed.
    """
    before = read_run(checkpoint).get("config", config)
    if not (changes := list(changed_keys(before, config))):
        return
    (key, old, new), others = changes[0], len(changes) - 1
    more = f" (and {others} more keys)" if others else ""
    said = f"{key} was {old!r} when {checkpoint} was written and is now {new!r}{more}"
    if strict:
        raise CheckpointError(
            f"{said}: that is another run, so give it another name; or say ckpt_path={checkpoint.resolve()} to go on "
            "all the same, ckpt_path=null to start anew, init_from=FILE to take the weights alone"
        )
    print_rank_zero(f"note: {said}")


def resume(folder: Path, checkpoint: Path, roll_back: bool) -> None:
    """Prepares the run folder for going on from `checkpoint`: its logs end there.

    Args:
        roll_back: the checkpoint was named, so newer ones in the folder are those of a run that is given up.
    """
    checkpoint = checkpoint.resolve()
    if checkpoint.parent != (folder / CHECKPOINTS).resolve():
        start_fresh(folder)
        return
    run = read_run(checkpoint)
    newer = [path for path in step_files(folder / CHECKPOINTS) if _step(path) > _step(checkpoint)]
    if newer and roll_back:
        print_rank_zero(f"{len(newer)} newer checkpoints were moved to {archive(folder, newer)}")
    rewind(folder, run.get("logged_steps", 0), run.get("step", 0), run.get("validating", False))


def start_fresh(folder: Path) -> None:
    """Empties a run folder without losing anything: what an earlier run left there is moved aside."""
    left = [folder / name for name in FILES if (folder / name).exists()]
    if step_files(folder / CHECKPOINTS) or (folder / "results.json").exists():
        print_rank_zero(f"the earlier run in {folder} was moved to {archive(folder, left)}")
    else:
        rewind(folder, 0, 0)  # it died before its first checkpoint, and the same steps come again


def archive(folder: Path, files: list[Path]) -> Path:
    """Moves files of a run into a new folder `earlier_N` within it."""
    number = 1
    while (aside := folder / f"earlier_{number}").exists():
        number += 1
    for path in files:
        (aside / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, aside / path.relative_to(folder))
    return aside


def rewind(folder: Path, logged_steps: int, step: int, validating: bool = False) -> None:
    """Drops what the logs say of steps that will be made again, so that nothing is in them twice.

    Args:
        logged_steps: value of the column `step` in metrics.csv from which on rows are dropped.
        step: number of the first optimizer step that is made again.
        validating: the validation after the last step is made again, too.
    """
    metrics, bad_steps = folder / METRICS, folder / BAD_STEPS
    if metrics.exists():
        rows = _rows_before(logged_steps, validating, [*csv.reader(whole_lines(metrics))])
        atomic_write(metrics, "".join(f"{csv_line(row)}\n" for row in rows).encode())
    if bad_steps.exists():
        lines = (line for line in whole_lines(bad_steps) if json.loads(line)["step"] < step)
        atomic_write(bad_steps, "".join(lines).encode())


def changed_keys(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, before, now) of all values that differ between two nested configs, but for those in `FREE`."""
    if key in FREE:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            yield from changed_keys(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now


def _step(path: Path) -> int:
    return int("".join(filter(str.isdigit, path.stem)) or 0)


def _rows_before(logged_steps: int, validating: bool, rows: list[list[str]]) -> list[list[str]]:
    """The header of metrics.csv and the rows that stay, see `rewind`."""
    if not rows:
        return []
    header = rows[0]
    column = header.index("step") if "step" in header else 0
    whole = [row for row in rows[1:] if len(row) == len(header) and row[column].isdigit()]
    kept = [row for row in whole if int(row[column]) < logged_steps]
    if validating:
        kept = [*takewhile(lambda row: int(row[column]) < logged_steps - 1 or not _validated(header, row), kept)]
    return [header, *kept]


def _validated(header: list[str], row: list[str]) -> bool:
    """Whether a row of metrics.csv is that of a validation."""
    return any(value for name, value in zip(header, row, strict=True) if name.startswith("val/"))

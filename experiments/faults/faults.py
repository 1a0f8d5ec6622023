"""The menu: each fault starts the training once, disturbs it, and says whether that went as it should.

Every function returns None if the training was over before the fault came, "" if all is well so far (the weights are
compared at the end of the run), or what was wrong. Its docstring is its line in the table.
"""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.faults.victim import Trouble

if TYPE_CHECKING:
    from experiments.faults.soak import Run

Fault = Callable[["Run"], str | None]
FULL = ("could not save step_", "wait in memory", "trying again in")  # what a run says of a full disk


def kill(run: "Run") -> str | None:
    """`kill -9` at any moment, start and end of the program included"""
    run.start()
    return run.ends() if run.over(run.moment()) else run.kill(with_workers=run.rng.random() < 0.5)


def kill_in_training(run: "Run") -> str | None:
    """`kill -9` within training"""
    run.start()
    return run.ends() if run.over_in_training() else run.kill(with_workers=run.rng.random() < 0.5)


def kill_in_save(run: "Run") -> str | None:
    """`kill -9` in the middle of writing a checkpoint"""
    run.start(Trouble(die_in_save=(run.rng.randint(1, 4), run.rng.random())))
    return run.ends(-signal.SIGKILL)


def kill_at_file(run: "Run") -> str | None:
    """`kill -9` at a file operation: opening, emptying, renaming, linking, removing"""
    run.start(Trouble(die_at_file=run.rng.randint(1, 100), emptied=run.rng.random() < 0.5))
    return run.ends(-signal.SIGKILL)


def terminate(run: "Run") -> str | None:
    """SIGTERM within training, half of the time a second one"""
    run.start()
    if run.over_in_training():
        return run.ends()
    return run.terminate(again=run.rng.choice((None, run.rng.uniform(0, 0.1))))


def terminate_then_kill(run: "Run") -> str | None:
    """SIGTERM within training, and `kill -9` before it has answered"""
    run.start()
    if run.over_in_training():
        return run.ends()
    os.kill(run.process.pid or 0, signal.SIGTERM)
    answered = (143, -signal.SIGTERM)
    return run.ends(*answered) if run.over(run.rng.uniform(0, 0.1)) else run.kill(allowed=answered)


def full_disk(run: "Run") -> str | None:
    """disk full: every checkpoint fails, in the middle or foreseen, then `kill -9`"""
    size = run.checkpoint_bytes
    in_the_middle = Trouble(largest_file=run.rng.randrange(size // 2, size))
    run.start(in_the_middle if run.rng.random() < 0.7 else Trouble(free=size))
    over = run.over_before(lambda: "could not save step_" in run.said()) or run.over(run.rng.uniform(0, run.training))
    problem = run.ends() if over else run.kill()
    return problem if "could not save step_" not in run.said() else problem or ""


def full_disk_for_a_while(run: "Run") -> str | None:
    """disk full to the last byte from within training on, until a `kill -9`, or until there is room again"""
    run.start()
    if run.over_in_training():
        return run.ends()
    filler = run.folder / "filler"
    try:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        over = run.over_before(lambda: any(words in run.said() for words in FULL))
        if over or run.over(run.rng.uniform(0, run.training / 4)):
            return run.ends()
        if run.rng.random() < 0.4:
            return run.kill()
    finally:
        filler.unlink()
    if run.rng.random() < 0.5 and not run.over(run.rng.uniform(0, run.training)):
        return run.kill()
    return run.ends() or ""


def damaged_checkpoint(run: "Run") -> str | None:
    """newest checkpoint torn, emptied or one bit flipped, after a `kill -9`"""
    run.start()
    over = run.over_before(lambda: len(run.checkpoints()) > 1) or run.over(run.rng.uniform(0, run.training / 2))
    problem = run.ends() if over else run.kill()
    files = run.checkpoints()
    if problem or len(files) < 2:
        return problem or None
    damage(files[-1], run, "torn", "emptied", "flipped")
    run.start()
    problem = run.ends() if run.over_in_training() else run.kill()
    return problem or ("" if "skipped a checkpoint" in run.said() else None)


def damaged_shard(run: "Run") -> str | None:
    """a shard of the set torn, emptied or one bit flipped before training"""
    return _without(run, lambda shard: damage(shard, run, "torn", "emptied", "flipped"), during_training=False)


def torn_shard(run: "Run") -> str | None:
    """a shard of the set torn or emptied during training"""
    return _without(run, lambda shard: damage(shard, run, "torn", "emptied"), during_training=True)


def lost_shard(run: "Run") -> str | None:
    """a shard that vanishes before or during training"""
    return _without(run, Path.unlink, during_training=run.rng.random() < 0.5)


def slow_storage(run: "Run") -> str | None:
    """storage that takes up to 0.2 s to open a file, and `kill -9` within training"""
    run.start(Trouble(slow=0.2, seed=run.rng.randrange(2**32)))
    return run.ends() if run.over_in_training() else run.kill()


def damage(path: Path, run: "Run", *ways: str) -> None:
    """Bytes of a file are lost or wrong, as after a power cut or on a bad disk."""
    size, way = path.stat().st_size, run.rng.choice(ways)
    with path.open("rb+") as file:
        file.seek(run.rng.randrange(max(size, 1)))
        if way == "flipped":
            byte = file.read(1)
            file.seek(-len(byte), os.SEEK_CUR)
            file.write(bytes(bits ^ (1 << run.rng.randrange(8)) for bits in byte))
        else:
            file.truncate(0 if way == "emptied" else None)


def _without(run: "Run", spoil: Callable[[Path], None], during_training: bool) -> str | None:
    """The run must name what it cannot read, and resume when it is back."""
    shard = run.rng.choice(sorted(run.data.rglob("*.tar")))
    aside = shutil.copy2(shard, run.data / "aside")
    try:
        if during_training:
            run.start()
            if run.over_in_training():
                return run.ends()
            spoil(shard)
        else:
            spoil(shard)
            run.start()
        problem = run.ends(1)
    finally:
        os.replace(aside, shard)
    return problem if problem or problem is None or str(shard) in run.said() else "the shard was not named"


# How often each kind is drawn, and its faults.
KILLS = 6, (kill, kill_in_training, kill_in_training, kill_in_save, kill_at_file)
SIGNALS = 4, (terminate, terminate, terminate_then_kill)
DISKS = 9, (full_disk, full_disk_for_a_while)
STORAGE = 2, (damaged_checkpoint, slow_storage)
SHARDS = 14, (damaged_shard, torn_shard, lost_shard)
MENU: dict[str, Fault] = {
    fault.__name__: fault for _, group in (KILLS, SIGNALS, DISKS, STORAGE, SHARDS) for fault in group
}


def drawn(run: "Run", on_shards: bool) -> Fault:
    """The next fault, of a kind that this run can have."""
    kinds = [KILLS, SIGNALS, DISKS, STORAGE, *([SHARDS] if on_shards else [])]
    ((_, group),) = run.rng.choices(kinds, [weight for weight, _ in kinds])
    return run.rng.choice([fault for fault in group if run.has_disk or fault is not full_disk_for_a_while])

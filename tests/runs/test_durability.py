"""Checkpoints outlive a kill at each of their writes, and a power cut at each of their steps.

The run that is watched calls the real `os.fsync`, which others of these tests do without.
"""

import json
import os
import posix
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import chain, combinations
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import pytest
import torch

from coca_lit.runs.checkpoint_io import inspect, newest_valid
from coca_lit.runs.run_folder import CHECKPOINTS, step_files
from helpers.resuming import MAP, assert_same, state, train

OFTEN = (
    *MAP,
    "trainer.max_epochs=1",
    "trainer.limit_val_batches=0",
    "callbacks.checkpoint.every_n_steps=1",
    "callbacks.checkpoint.keep_last=1",
)
CHANGES = ("replace", "symlink", "unlink")  # what coca_lit.files does to names


def watch_changes(before: Callable[[str, tuple[Any, ...]], None]) -> None:
    """From now on `before` is called ahead of each write, sync and change of a name in this process."""
    for name in (*CHANGES, "fsync"):
        real = getattr(posix, name)

        def change(*args: Any, name: str = name, real: Any = real) -> Any:
            before(name, args)
            return real(*args)

        setattr(os, name, change)
    save = torch.save

    class Written(NamedTuple):
        file: Any

        def write(self, data: bytes) -> int:
            before("write", (self.file, data))
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    torch.save = lambda content, file: save(content, Written(file))


class DieAtEach(L.Callback):
    """Before the checkpoint of step 2, as many copies of the process as it has writes: each dies at another one. What
    it leaves on the disk is kept as `killed_N`. Of the writes of a file every `stride`-th counts.
    """

    def __init__(self, folder: Path, stride: int) -> None:
        self.folder, self.stride = folder, stride

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step != 2:
            return
        before = self.folder.with_name("before")
        shutil.copytree(self.folder, before, symlinks=True)
        for number in range(1000):
            if (child := os.fork()) == 0:
                self.die_at(number)
                return
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            self.folder.rename(self.folder.with_name(f"killed_{number}"))
            shutil.copytree(before, self.folder, symlinks=True)
            if code == 0:
                os._exit(0)
            assert code == -signal.SIGKILL

    def die_at(self, number: int) -> None:
        writes = changes = 0

        def die(name: str, args: tuple[Any, ...]) -> None:
            nonlocal writes, changes
            if name == "write":
                writes += 1
                if writes % self.stride:
                    return
            if changes == number:
                if name == "write":  # half of it
                    file, data = args
                    file.write(data[: len(data) // 2])
                    file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            changes += 1

        watch_changes(die)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            os._exit(0)  # a copy that has written the whole checkpoint


class Record(L.Callback):
    """Writes down what happens to the files of the run until the checkpoint of step 2 has its names. A sync keeps the
    content that it makes safe.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept, self.known, self.lines = folder, folder.with_name("synced"), dict[str, int](), 0

    def setup(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self.kept.mkdir()
        for path in self.folder.iterdir():  # what is there is safe: it was synced before
            self.known[path.name] = path.lstat().st_ino
            self.add("create", path.name, self.known[path.name])
            shutil.copyfile(path, self.kept / str(self.lines))
            self.add("sync", path.name, self.known[path.name])
        self.add("sync", ".", None)
        watch_changes(self.note)

    def note(self, name: str, args: tuple[Any, ...]) -> None:
        for path in sorted(self.folder.rglob("*")):
            place, number = str(path.relative_to(self.folder)), path.lstat().st_ino
            if self.known.get(place) != number and not path.is_symlink() and path.is_file():
                self.add("create", place, number)
            self.known[place] = number
        if name == "write" or (name != "fsync" and not Path(args[-1]).is_relative_to(self.folder)):
            return
        if name == "fsync":
            opened = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
            if not opened.is_relative_to(self.folder):
                return
            if opened.is_file():
                shutil.copyfile(opened, self.kept / str(self.lines))
            self.add("sync", str(opened.relative_to(self.folder)), opened.stat().st_ino)
        elif name == "replace":
            source, target = (Path(path) for path in args)
            is_link, number = source.is_symlink(), source.lstat().st_ino
            what = os.readlink(source) if is_link else number
            self.add("replace", str(target.relative_to(self.folder)), what)
            self.add("unlink", str(source.relative_to(self.folder)), None)
            self.known.pop(str(source.relative_to(self.folder)))
            self.known[str(target.relative_to(self.folder))] = number
        elif name == "unlink" and os.path.lexists(args[0]):
            self.add("unlink", str(Path(args[0]).relative_to(self.folder)), None)
            self.known.pop(str(Path(args[0]).relative_to(self.folder)), None)

    def add(self, what: str, place: str, value: Any) -> None:
        with self.folder.with_name("record.jsonl").open("a") as file:
            file.write(json.dumps([what, place, value]) + "\n")
        self.lines += 1

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            os._exit(0)


def after_power_cuts(record: list[list[Any]], kept: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """What may be on the disk after a power cut ahead of each recorded change, with the number of that change: names
    with a content or, as a text, with the name that a link leads to.

    A file has the content of its last sync, and is empty without one. A change of a name is sure after a sync of its
    folder; of those since then any may be there. Folders themselves are.
    """
    content = dict[int, bytes]()
    sure = dict[str, Any]()
    unsure = list[tuple[str, Any]]()  # names and what they lead to, or None
    for number, (what, place, value) in enumerate([*record, ["end", "", None]]):
        for changes in chain.from_iterable(combinations(unsure, count) for count in range(len(unsure) + 1)):
            names = {name: it for name, it in (sure | dict(changes)).items() if it is not None}
            yield number, {name: it if isinstance(it, str) else content.get(it, b"") for name, it in names.items()}
        if what == "sync" and (kept / str(number)).exists():
            content[value] = (kept / str(number)).read_bytes()
        elif what == "sync":
            here = [change for change in unsure if str(Path(change[0]).parent) == place]
            sure |= dict(here)
            unsure = [change for change in unsure if change not in here]
        else:
            unsure.append((place, value))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, *OFTEN) == 0
    return folder


@pytest.mark.slow
def test_a_kill_at_each_write_of_a_checkpoint(tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    assert train(run, *OFTEN, watch=DieAtEach(run, stride=300)) == 0
    killed = sorted(tmp_path.glob("killed_*"), key=lambda path: int(path.name.removeprefix("killed_")))
    steps = [newest_valid(folder / CHECKPOINTS)[1]["global_step"] for folder in killed]
    assert steps == sorted(steps)
    assert {*steps} == {1, 2}
    assert len(steps) > 12  # pieces of the file, its sync, its name, the folder's sync, and so on
    kinds = dict[tuple[int, int], Path]()
    for step, folder in zip(steps, killed, strict=True):
        kinds.setdefault((step, len([*(folder / CHECKPOINTS).iterdir()])), folder)
    for folder in kinds.values():
        assert train(folder, *OFTEN) == 0
        assert_same(whole, folder)
        assert not [*folder.rglob("*.coca_lit-tmp")]


@pytest.mark.slow
def test_a_power_cut_at_each_change_of_a_checkpoint(tmp_path: Path, whole: Path) -> None:
    """As soon as the folder of the first checkpoint is synced there is always a whole one, and a torn one never."""
    run = tmp_path / "run"
    assert train(run, *OFTEN, watch=Record(run)) == 0
    record = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    synced = [number for number, (what, place, _) in enumerate(record) if (what, place) == ("sync", CHECKPOINTS)]
    trained = record.index(["sync", ".", None])
    kinds = dict[tuple[int, frozenset[str]], Path]()
    seen = set[tuple[bool, frozenset[tuple[str, int]]]]()
    for number, state_of_disk in after_power_cuts(record, tmp_path / "synced"):
        checkpoints = {name: it for name, it in state_of_disk.items() if name.startswith(CHECKPOINTS)}
        key = number > synced[0], frozenset((name, hash(it)) for name, it in checkpoints.items())
        if key in seen or number <= trained:
            continue
        seen.add(key)
        folder = tmp_path / f"cut_{len(seen)}"
        for name, it in state_of_disk.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(it) if isinstance(it, str) else (folder / name).write_bytes(it)
        steps = [inspect(path)["global_step"] for path in step_files(folder / CHECKPOINTS)]  # none is torn
        assert number <= synced[0] or 1 in steps or 2 in steps, checkpoints.keys()
        named = frozenset(name for name in checkpoints if not name.endswith("-tmp"))
        if kinds.setdefault((max(steps, default=0), named), folder) is not folder:
            shutil.rmtree(folder)
    assert len(seen) > 8
    resumed = {step: folder for (step, _), folder in kinds.items()}
    assert resumed.keys() == {0, 1, 2}
    for folder in resumed.values():
        assert train(folder, *OFTEN) == 0
        for name in ("state_dict", "optimizer_states", "lr_schedulers"):
            torch.testing.assert_close(state(folder)[name], state(whole)[name], rtol=0, atol=0)

"""Training that makes no progress: who reports it, what the report says, and how it ends."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coca_lit.callbacks import StallGuard, stall_guard
from coca_lit.callbacks.stall_guard import unwatched


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The rank that the guard believes to be, the number of processes, and the clock."""
    state = SimpleNamespace(rank=0, size=1, now=100.0)
    monkeypatch.setattr(stall_guard, "rank", lambda: state.rank)
    monkeypatch.setattr(stall_guard, "world_size", lambda: state.size)
    monkeypatch.setattr(stall_guard, "time", SimpleNamespace(monotonic=lambda: state.now))
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)  # the tests look themselves
    return state


def trainer(step: int = 0, workers: int = 0) -> Any:
    strategy = SimpleNamespace(launcher=None)
    return SimpleNamespace(global_step=step, strategy=strategy, datamodule=SimpleNamespace(num_workers=workers))


def batch(*keys: str) -> Any:
    return SimpleNamespace(keys=list(keys), images=torch.zeros(len(keys), 1))


def test_awaited_worker_is_named_by_what_it_read_last(
    tmp_path: Path, world: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    guard, run = StallGuard(tmp_path, minutes=2), trainer(7, workers=2)
    guard.on_train_start(run, None)  # type: ignore[arg-type]
    for keys in (("a", "b"), ("c", "d"), ("e", "f")):
        guard.on_train_batch_start(run, None, batch(*keys), 0)  # type: ignore[arg-type]
        guard.on_train_batch_end(run, None, None, None, 0)  # type: ignore[arg-type]
        world.now += 100
        guard._look()
    assert caplog.text == ""
    world.now += 100
    guard._look()
    guard._look()  # once is enough
    (said,) = caplog.messages
    assert said == (
        "the run has waited for data for 3 minutes after step 7; the worker that is awaited read last: d"  # of e, f: no
    )
    guard.on_train_batch_start(run, None, batch("g"), 0)  # type: ignore[arg-type]
    world.now += 121
    guard._look()
    assert caplog.messages[1:] == ["the run has been in the step at step 7 for 2 minutes; samples: g"]


def test_scores_and_checkpoints_may_take_their_time(
    tmp_path: Path, world: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    guard, run = StallGuard(tmp_path, minutes=1), trainer()
    run.callbacks = [guard]
    guard._look()
    guard.on_train_start(run, None)  # type: ignore[arg-type]
    with unwatched(run):
        world.now += 1000
        guard._look()
    guard._look()
    assert caplog.messages == []
    world.now += 61
    guard._look()
    assert len(caplog.messages) == 1
    guard.on_train_end(run, None)  # type: ignore[arg-type]
    world.now += 1000
    guard._look()
    assert len(caplog.messages) == 1


def test_silent_rank_is_named_by_another(
    tmp_path: Path, world: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 is stopped: it writes nothing, so rank 1 speaks, and rank 2 need not."""
    world.size = 3
    guards = [StallGuard(tmp_path, minutes=1) for _ in range(3)]
    for world.rank, guard in enumerate(guards):
        guard.on_train_start(trainer(5), None)  # type: ignore[arg-type]
        guard.on_train_batch_start(trainer(5), None, batch(f"x{world.rank}", "y", "z", "w"), 0)  # type: ignore[arg-type]
        guard._look()
    for _ in range(7):
        world.now += 12
        for world.rank in (1, 2):
            guards[world.rank]._look()
    assert [message.split(" on ")[0] for message in caplog.messages] == [
        f"no progress for 72 seconds, rank 1 is at step 5 and waits for rank 0 (process {os.getpid()}"
    ]
    assert caplog.messages[0].endswith(", silent since step 5, samples x0, y, z and 1 more")
    world.rank = 0
    guards[0].teardown(trainer(), None, "fit")  # type: ignore[arg-type]
    assert not [*tmp_path.iterdir()]


def test_nothing_is_watched_without_limits(tmp_path: Path, world: SimpleNamespace) -> None:
    guard = StallGuard(tmp_path, minutes=None)
    guard.on_train_start(trainer(), None)  # type: ignore[arg-type]
    assert guard._doing is None
    with pytest.raises(ValueError, match="minutes must be above 0, or null for never, got 0"):
        StallGuard(tmp_path, minutes=0)

"""Real processes, really killed: a run resumed from a checkpoint ends with the same bits as an undisturbed one."""

import json
import math
import os
import re
import signal
import time
import zlib
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import Timer

from coca_lit.callbacks import Checkpoints, NonFiniteGuard
from coca_lit.cli.assembly import plain
from coca_lit.cli.schema import argument_defaults
from coca_lit.data.batch import Batch
from coca_lit.errors import CheckpointError, ConfigError, TrainingError
from coca_lit.runs import checkpoint_io, run_folder
from coca_lit.runs.checkpoint_io import inspect, newest_valid
from coca_lit.runs.results import Found, finish_run
from coca_lit.runs.resume import (
    RUN_KEY,
    ResumePoint,
    check_same_run,
    find_checkpoint,
    finished_results,
    identity_of,
    is_requeued,
    resume_command,
)
from coca_lit.runs.run_folder import rewind_logs, rewind_run, start_fresh, start_run_folder, step_files
from coca_lit.runs.signals import requeue_once
from coca_lit.tools.prepare.scenes import export_scenes
from helpers.forking import Program
from helpers.resuming import MAP, TINY, Die, Signal, assert_same, rows, state, train
from helpers.running import ROOT, compose, run, watched
from helpers.slow import slow
from helpers.tokenizer_files import trained_file


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("shards")
    for i in range(3):
        export_scenes("shards", folder / str(i), count=10, size=32)
    return ("data=laion", f"data.shards={folder}/*/*.tar", "data.epoch_samples=24")


BY_STEPS = ("scoring.every_n_steps=2", "callbacks.checkpoint.best=scenes/t2i_median_rank", "scoring.quick=3")
DRAWN_OBJECTIVE = ("model.objectives.drawn={_target_: helpers.objectives.DrawnTargets}",)
ACCUMULATION = ("trainer.accumulate_grad_batches=2", "model.caption_weight=0")
EMA_AND_ACCUMULATION = ("ema=0.9", *ACCUMULATION)


@pytest.mark.parametrize(
    ("data", "workers", "extra"),
    [
        ("indexed", 2, EMA_AND_ACCUMULATION),
        *slow(("map", 0, (*BY_STEPS, *DRAWN_OBJECTIVE))),
    ],
)
def test_killed_twice_in_an_epoch(
    tmp_path: Path, request: pytest.FixtureRequest, data: str, workers: int, extra: tuple[str, ...]
) -> None:
    """Batch 3 is within an accumulation of two, 5 after the validation within the epoch, 12 the very last."""
    source = MAP if data == "map" else request.getfixturevalue("shards")
    overrides = (*source, f"data.num_workers={workers}", "callbacks.checkpoint.every_n_steps=1", *extra)
    assert train(tmp_path / "whole", *overrides) == 0
    for batches in {"map": (5, 12), "indexed": (3,)}[data]:
        assert train(tmp_path / "killed", *overrides, watch=Die(batches)) == -signal.SIGKILL
    assert train(tmp_path / "killed", *overrides) == 0
    assert_same(tmp_path / "whole", tmp_path / "killed")
    if data == "map":
        steps = [row for row in rows(tmp_path / "whole") if row["train/drawn_loss"]]
        assert len(steps) == 12
        assert all(row["train/target"] and row["train/contrastive_loss"] for row in steps)


@pytest.mark.slow
def test_windows_of_a_store_are_resumed_with_other_workers(tmp_path: Path, shards: tuple[str, ...]) -> None:
    """Shards on a real S3 server: killed with two workers, then finished by one."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    from helpers.faulty_store import FaultyStore

    local = sorted(Path(shards[1].partition("=")[2].partition("*")[0]).glob("*/*.tar"))
    with closing(FaultyStore()) as store:
        store.put("bucket", {f"set/{i}.tar": path.read_bytes() for i, path in enumerate(local)})
        keys = {"AWS_ENDPOINT_URL": store.url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        windows = (
            *("data=laion", "data.shards=s3://bucket/set/*.tar", "data.epoch_samples=24", "data.window=12"),
            *("data.readers=2", f"data.cache_dir={tmp_path}/cache", "callbacks.checkpoint.every_n_steps=1"),
        )
        assert train(tmp_path / "whole", *windows, "data.num_workers=0", environment=keys) == 0
        killed = train(tmp_path / "killed", *windows, "data.num_workers=2", watch=Die(8), environment=keys)
        assert killed == -signal.SIGKILL
        assert train(tmp_path / "killed", *windows, "data.num_workers=1", environment=keys) == 0
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")
    weights = [state(tmp_path / name)["state_dict"] for name in ("whole", "killed")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.slow
def test_stopped_early_is_finished(tmp_path: Path) -> None:
    """After one of three epochs; a kill before the scores does not make it train on."""
    stopping = (
        "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/caption_loss, "
        "divergence_threshold: 0}"
    )
    for _ in range(2):
        run(tmp_path, *TINY, "data.train_count=8", "trainer.val_check_interval=1.0", "trainer.max_epochs=3", stopping)
        assert state(tmp_path)["global_step"] == 2
        (tmp_path / "results.json").unlink()


TRAINING_ALONE = (
    *(*TINY, *MAP, *ACCUMULATION, "trainer.limit_val_batches=0", "scoring.every_n_epochs=null"),
    "model.cooldown_steps=0",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder, *TRAINING_ALONE)
    return folder


def test_a_run_does_not_end_before_its_checkpoint(tmp_path: Path) -> None:
    """Of 6 steps in 2 epochs. It can be repeated, and end earlier from an earlier checkpoint."""
    words = (*TRAINING_ALONE, "report=null", "callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep_last=9")
    run(tmp_path, *words)
    before = (tmp_path / "config.yaml").read_text()
    step_4 = f"ckpt_path={tmp_path}/checkpoints/step_4.ckpt"
    for shorter, has in (
        (("trainer.max_steps=5",), "6 steps"),
        (("trainer.max_epochs=1",), "2 epochs"),
        (("trainer.max_epochs=1", step_4), "2 epochs"),
        (("trainer.max_steps=3", step_4), "4 steps"),
    ):
        with pytest.raises(ConfigError, match=rf"^{shorter[0]}: .* has {has} already; raise it, take another name"):
            run(tmp_path, *words, *shorter)
    assert (tmp_path / "config.yaml").read_text() == before
    (tmp_path / "results.json").unlink()
    run(tmp_path, *words)
    assert state(tmp_path)["global_step"] == 6
    run(tmp_path, *words, "trainer.max_epochs=1", step_4.replace("step_4", "step_2"))
    assert state(tmp_path)["global_step"] == 3


class StopEarly(L.Callback):
    """Ends training with the batch that makes `batches` in all."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches


@pytest.mark.slow
@pytest.mark.parametrize("batches", [3, 4, 6])
def test_a_run_that_had_ended_goes_on_where_it_was(tmp_path: Path, whole: Path, batches: int) -> None:
    """Within the accumulation of a step, which begins again, after the second step, or with the epoch."""
    with watched(StopEarly(batches)):
        run(tmp_path, *TRAINING_ALONE, "trainer.max_epochs=1")
    assert state(tmp_path)["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] == (batches == 6)
    run(tmp_path, *TRAINING_ALONE)
    found, expected = state(tmp_path), state(whole)
    for progress in ("epoch_progress", "epoch_loop.batch_progress"):
        assert found["loops"]["fit_loop"][progress] == expected["loops"]["fit_loop"][progress]
    if batches == 3:  # the batch norms of the image encoder have seen it twice, and so have the final scores
        del found["state_dict"], expected["state_dict"]
    for name in found.keys() & {"state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"}:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    assert rows(tmp_path)[:-1] == rows(whole)[:-1]


class SignalInValidation(L.Callback):
    """SIGTERM to its own process in the first batch of the validation after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if trainer.global_step == self.step:
            assert batch_idx == 0, "the signal was not answered"
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_signal_in_a_validation_is_answered_there(tmp_path: Path) -> None:
    """And the validation is repeated: twice the one within the epoch, since a kill comes before the next checkpoint,
    and the one at its end.
    """
    often = ("data.train_count=32", "trainer.val_check_interval=4", "trainer.limit_val_batches=2")
    overrides = (*often, *EMA_AND_ACCUMULATION)
    assert train(tmp_path / "whole", *overrides) == 0
    for watch, code in ((SignalInValidation(2), 143), (Die(6), -signal.SIGKILL), (SignalInValidation(4), 143)):
        assert train(tmp_path / "stopped", *overrides, watch=watch) == code
        assert state(tmp_path / "stopped")[RUN_KEY]["validating"]
    assert train(tmp_path / "stopped", *overrides) == 0
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ((signal.SIGTERM, signal.SIGTERM), 143),
        *slow(((signal.SIGINT,), 130), ((signal.SIGUSR1,), 143)),
    ],
)
def test_signal_saves_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, ...], code: int
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
    environment = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"} | (slurm if signal.SIGUSR1 in numbers else {})
    assert train(tmp_path / "run", *MAP, watch=Signal(*numbers), environment=environment) == code
    assert state(tmp_path / "run")["global_step"] == 2
    assert state(tmp_path / "run")[RUN_KEY]["samples"] == 8
    assert not (tmp_path / "run" / "results.json").exists()
    assert "resume with: " in (tmp_path / "run.log").read_text()
    if signal.SIGUSR1 in numbers:
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"
        assert "stopping after step 2 on signal 10: saved" in (tmp_path / "run.log").read_text()


def test_signal_in_the_last_step_stops_before_the_scores(tmp_path: Path) -> None:
    last = (*MAP, "ema=0.9", "trainer.max_steps=2")
    assert train(tmp_path / "whole", *last) == 0
    assert train(tmp_path / "stopped", *last, watch=Signal(signal.SIGTERM)) == 143
    assert not (tmp_path / "stopped" / "results.json").exists()
    assert train(tmp_path / "stopped", *last) == 0
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("names", "asks"),
    [({"SLURM_PROCID": "0"}, True), ({"SLURM_PROCID": "1"}, False), ({"SLURM_PROCID": "0", "RANK": "3"}, False)],
)
def test_one_process_of_a_job_requeues_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: dict[str, str], asks: bool
) -> None:
    """Also under `srun torchrun`, where every process of the first machine has the number 0 of SLURM."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/requeued\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in {"SLURM_JOB_ID": "77", **names}.items():
        monkeypatch.setenv(name, value)
    handler = signal.getsignal(signal.SIGUSR1)
    try:
        requeue_once(signal.SIGUSR1, None)
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert (tmp_path / "requeued").exists() == asks


@pytest.mark.slow
def test_under_submitit_its_own_handler_comes_after_saving(tmp_path: Path) -> None:
    submitit = {"SUBMITIT_EXECUTOR": "slurm"}
    assert train(tmp_path / "run", *MAP, watch=Signal(signal.SIGUSR2), environment=submitit) == 7
    assert state(tmp_path / "run")["global_step"] == 2
    said = (tmp_path / "run.log").read_text()
    assert said.index("stopping after step 2") < said.index("submitit was here")


@pytest.mark.slow
def test_signal_to_one_of_two_ranks_stops_both_and_one_goes_on(tmp_path: Path) -> None:
    """Lightning's own launcher, which starts a second `train.py`; the signal reaches rank 0 alone."""
    ranks = ("trainer.devices=2", "trainer.strategy=ddp", "trainer.max_epochs=200")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = Program(str(ROOT / "train.py"), *TINY, *MAP, *ranks, cwd=tmp_path, environment=environment)
    while "step 2/" not in program.said() and program.process.is_alive():
        time.sleep(0.05)
    program.process.terminate()
    done = program.wait()
    assert done.returncode == 143, done.stderr
    assert done.stdout.count("stopping after step") == 1
    assert done.stdout.count("step 2/") == 1
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["test"]  # both agree on the folder
    folder = tmp_path / "outputs" / "test"
    run = state(folder)[RUN_KEY]
    assert run["processes"] == 2
    assert run["samples"] == 4 * run["step"]
    epochs = run["step"] // 6 + 1
    assert train(folder, *MAP, f"trainer.max_epochs={epochs}") == 0
    said = (tmp_path / "outputs" / "test.log").read_text()
    assert "note: 2 processes became 1" in said
    assert f"note: max_epochs was 200 and is now {epochs}: " in said
    assert state(folder)[RUN_KEY]["samples"] == 24 * epochs


class Poison(L.Callback):
    """Makes one gradient of the steps infinite."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step in self.steps:
            gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
            gradient.view(-1)[0] = float("nan")


def test_step_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    every = ("callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep_last=20", "trainer.max_epochs=1")
    assert train(tmp_path / "run", *MAP, *every, watch=Poison(2)) == 0
    before, after = (
        torch.load(tmp_path / "run" / "checkpoints" / f"step_{step}.ckpt", weights_only=True) for step in (2, 3)
    )
    torch.testing.assert_close(after["state_dict"], before["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(
        after["optimizer_states"][0]["state"], before["optimizer_states"][0]["state"], rtol=0, atol=0
    )
    (line,) = (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["step"], entry["reason"], len(entry["keys"])) == (2, "gradient not finite", 4)
    assert not torch.equal(
        state(tmp_path / "run")["state_dict"]["net.logit_scale"], after["state_dict"]["net.logit_scale"]
    )


@pytest.mark.slow
def test_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    assert train(tmp_path / "run", *MAP, "callbacks.non_finite_guard.max_in_a_row=3", watch=Poison(0, 2, 3, 4, 5)) == 1
    assert "the gradients of 3 steps in a row, 2 to 4, were not finite" in (tmp_path / "run.log").read_text()


def test_spike_is_noted_with_its_samples(tmp_path: Path) -> None:
    guard = NonFiniteGuard(tmp_path)
    logs = SimpleNamespace(should_update_logs=True)
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=1, global_step=0, estimated_stepping_batches=100, _logger_connector=logs, precision=""
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    module: Any = SimpleNamespace(log=lambda *_: None, modules=list)
    for step, loss in enumerate([*(4 - 0.02 * i for i in range(30)), 9.0, 3.4]):
        trainer.global_step = step
        batch: Any = SimpleNamespace(keys=[f"sample {step}"])
        guard.on_train_batch_start(trainer, module, batch, step)
        guard.on_before_backward(trainer, module, torch.tensor(loss))
        guard.on_before_optimizer_step(trainer, module, optimizer)
        guard.on_train_batch_end(trainer, module, None, batch, step)
    (line,) = (tmp_path / "bad_steps.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["step"], entry["loss"], entry["keys"]) == (30, 9.0, ["sample 30"])


def test_losses_that_are_not_finite_end_a_run_with_a_loss_scale(tmp_path: Path) -> None:
    """Gradients that are not finite are how the scale is found, and are left to the scaler."""
    guard = NonFiniteGuard(tmp_path, max_in_a_row=3)
    scaler = SimpleNamespace(scaler=SimpleNamespace(scale=lambda x: 8 * x))
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=1, global_step=0, precision="16-mixed", precision_plugin=scaler, is_global_zero=True
    )
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.full((1,), torch.inf)
    optimizer, module = torch.optim.SGD([weight]), cast("Any", SimpleNamespace(modules=list))

    def steps(*losses: float) -> None:
        for loss in losses:
            guard.on_train_batch_start(trainer, module, cast("Any", SimpleNamespace(keys=["a"])), 0)
            guard.on_before_backward(trainer, module, torch.tensor(8 * loss))
            guard.on_before_optimizer_step(trainer, module, optimizer)

    steps(1.0, 1.0, 1.0, 1.0, math.nan, math.nan, 1.0, math.nan, math.nan, math.inf)
    with pytest.raises(TrainingError, match="3 steps in a row"):
        steps(math.nan)
    assert weight.grad is not None


# Files


def checkpoint(step: int = 1, **run: Any) -> dict[str, Any]:
    return {
        "state_dict": {"w": torch.full((50_000,), float(step))},
        "global_step": step,
        "loops": {},
        RUN_KEY: {"step": step, **run},
    }


def save(folder: Path, step: int, **run: Any) -> Path:
    path = folder / "checkpoints" / f"step_{step}.ckpt"
    checkpoint_io.save(checkpoint(step, **run), path)
    return path


def start_at(path: Path) -> ResumePoint:
    return ResumePoint(path, inspect(path))


def test_a_disk_that_keeps_half_of_a_checkpoint_costs_that_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, whole = save(tmp_path, 9), torch.save

    def torn(content: Any, file: Any) -> None:
        whole(content, file)
        file.truncate(60_000)

    monkeypatch.setattr(torch, "save", torn)
    save(tmp_path, 10)
    assert "could not save step_10.ckpt" in caplog.text
    assert step_files(first.parent) == [first]


def test_torn_and_corrupt_checkpoints_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (9, 10, 11):
        save(tmp_path, step)
    folder = tmp_path / "checkpoints"
    torn, flipped = (folder / "step_11.ckpt"), (folder / "step_10.ckpt")
    torn.write_bytes(torn.read_bytes()[:60_000])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    torch.load(flipped, weights_only=True)  # PyTorch notices nothing
    found = newest_valid(folder)
    assert found is not None
    assert found[0].name == "step_9.ckpt"
    assert "step_11.ckpt is not a whole checkpoint" in caplog.text
    assert "step_10.ckpt is not a whole checkpoint: its part '" in caplog.text
    found[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        newest_valid(folder)


def test_damaged_newer_checkpoints_do_not_count_as_the_last_ones(tmp_path: Path) -> None:
    """After step 7, a trainer that keeps one checkpoint keeps that one."""
    save(tmp_path, 6)
    save(tmp_path, 9).write_bytes(b"torn")
    start = find_checkpoint(tmp_path, "auto", first_process=True)
    assert start is not None
    rewind_run(tmp_path, start.run)
    trainer: Any = SimpleNamespace(global_step=7, save_checkpoint=lambda path: save(tmp_path, 7))
    nothing: Any = None
    Checkpoints(tmp_path, keep_last=1)._save(trainer, nothing)
    assert [path.name for path in step_files(tmp_path / "checkpoints")] == ["step_7.ckpt"]
    assert (tmp_path / "checkpoints" / "last.ckpt").resolve().name == "step_7.ckpt"
    assert (tmp_path / "earlier_1" / "checkpoints" / "step_9.ckpt").read_bytes() == b"torn"


def test_a_resume_reads_its_checkpoint_once(tmp_path: Path) -> None:
    path = save(tmp_path, 1, config={"seed": 1})
    start = find_checkpoint(tmp_path, "auto", first_process=True)
    assert start is not None
    path.unlink()
    check_same_run(start, {"seed": 1}, strict=True)
    with pytest.raises(CheckpointError, match=r"^seed was 1 when .* is now 2"):
        check_same_run(start, {"seed": 2}, strict=True)
    rewind_run(tmp_path, start.run)


def test_other_processes_read_a_checkpoint_that_the_first_one_will_replace(tmp_path: Path) -> None:
    save(tmp_path, 1, config={"seed": 1})
    torn = save(tmp_path, 2, config={"seed": 2})
    (torn.parent / "last.ckpt").symlink_to(torn.name)
    torn.write_bytes(torn.read_bytes()[:100])
    start = find_checkpoint(tmp_path, "auto", first_process=False)
    assert start is not None
    assert start.run["config"] == {"seed": 1}


@pytest.mark.parametrize("how", ["foreseen", "while writing"])
def test_full_disk_costs_a_checkpoint_and_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    path = save(tmp_path, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if how == "foreseen":
        monkeypatch.setattr(checkpoint_io.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000_000 - 2**25))
    else:
        monkeypatch.setattr(checkpoint_io.torch, "save", full)
    save(tmp_path, 2)
    assert "could not save step_2.ckpt" in caplog.text
    assert [p.name for p in path.parent.iterdir()] == ["step_1.ckpt"]
    assert inspect(path)["global_step"] == 1


def test_a_run_whose_last_checkpoint_is_not_on_disk_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = (*TINY, "trainer.max_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_io.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**23))
        with pytest.raises(TrainingError, match=r"^the trained weights are not on disk: .*step_2\.ckpt"):
            run(tmp_path / "run", *words)
    assert re.search(r"needs \d+ MB, 64 MB stay free for logs and samples, and 8 MB are free", caplog.text)
    assert (tmp_path / "run" / "results.json").exists()
    run(tmp_path / "run", *words)
    assert inspect(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        checkpoint_io.save({"code": Die(1)}, tmp_path / "step_1.ckpt")
    assert not [*tmp_path.iterdir()]


# Configs and folders


@pytest.mark.parametrize(
    "written", ["checkpoints/step_1.ckpt", "~/checkpoints/step_1.ckpt", "{}/checkpoints/last.ckpt"]
)
def test_a_checkpoint_belongs_to_its_run_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to(save(tmp_path, 1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    start = find_checkpoint(tmp_path, written.format(tmp_path), first_process=True)
    assert start is not None
    assert start.content["global_step"] == 1
    assert start.lies_in(tmp_path)
    assert not start.lies_in(tmp_path / "other")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=7", "seed"),
        ("model.net.name=coca_vit_b32", "model.net.name"),
        ("experiment=finetune_mscoco", "image_size"),
        ("init_parts.image_encoder=efficientnet_lite0", "init_parts.image_encoder"),
        ("callbacks.non_finite_guard=null", "callbacks.non_finite_guard"),
        ("data.num_workers=5", None),
        ("trainer.max_epochs=9", None),
    ],
)
def test_changed_config_is_refused_by_its_key(tmp_path: Path, override: str, key: str | None) -> None:
    before, now = (identity_of(plain(compose(f"output_dir={tmp_path}", *o))) for o in ((), (override,)))
    path = save(tmp_path, 1, config=before)
    if key is None:
        check_same_run(start_at(path), now, strict=True)
        return
    with pytest.raises(CheckpointError, match=rf"^{key} was ") as caught:
        check_same_run(start_at(path), now, strict=True)
    assert "\n" not in str(caught.value)
    check_same_run(start_at(path), now, strict=False)


def test_another_tokenizer_under_the_name_of_the_first_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, as where a corpus has grown: token ids would stand for other texts."""
    file = trained_file("WordPiece", tmp_path)
    words = (
        *TINY,
        *MAP,
        f"model.net.tokenizer={{file: {file}, start: '<s>', end: '</s>', pad: '<pad>'}}",
        "vocabulary=null",
    )
    run(tmp_path / "run", *words, "trainer.max_steps=1")
    compress = zlib.compress
    monkeypatch.setattr(zlib, "compress", lambda content, level: compress(content, 1))  # as another version may pack it
    run(tmp_path / "run", *words, "trainer.max_steps=2")
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [word for word in vocabulary if word.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"model\.net\.tokenizer"):
        run(tmp_path / "run", *words, "trainer.max_steps=3")


@pytest.mark.parametrize("listed", [False, True])
def test_a_default_is_the_same_whether_a_config_lists_it_or_not(tmp_path: Path, listed: bool) -> None:
    words = ("model.label_smoothing=0.0", "data.objects=2", "model.optimizer.layer_decay=1.0", "lora.alpha=16")
    configs = [identity_of(plain(compose(f"output_dir={tmp_path}", *more))) for more in ((), words)]
    before, now = reversed(configs) if listed else configs
    path = save(tmp_path, 1, config=before)
    check_same_run(start_at(path), now, strict=True, defaults=argument_defaults(now))
    now["model"]["label_smoothing"] = 0.1
    with pytest.raises(CheckpointError, match=r"^model.label_smoothing was 0.0 when .* and is now 0.1: "):
        check_same_run(start_at(path), now, strict=True, defaults=argument_defaults(now))


@pytest.mark.parametrize("lost", ["nothing", "report.html", "checkpoint"])
def test_finished_means_that_everything_is_there(tmp_path: Path, lost: str) -> None:
    """A full disk may have cost the last checkpoint although the scores were written, and a kill the report."""
    cfg = compose(f"output_dir={tmp_path}")
    path = save(tmp_path, 3, finished=lost != "checkpoint")
    start_run_folder(cfg, start_at(path).run)
    finish_run(tmp_path, Found({"scenes/CIDEr": 1.0}), report=write_report)
    (tmp_path / lost).unlink(missing_ok=True)
    cfg.scoring.objective = "scenes/CIDEr"  # ranks scores and computes none
    assert finished_results(cfg, start_at(path)) == ({"scenes/CIDEr": 1.0} if lost == "nothing" else None)


@pytest.mark.parametrize(
    "change", ["trainer.max_epochs=9", "trainer.max_time='00:01:00:00'", "scoring.images=7", "evals=[]"]
)
def test_a_changed_run_is_not_finished(tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither before it starts nor, if it is killed before its first new checkpoint, after that."""
    cfg = compose(f"output_dir={tmp_path}", "+trainer.max_time=00:00:01:00")
    path = save(tmp_path, 3, finished=True)
    start_run_folder(cfg, start_at(path).run)
    finish_run(tmp_path, Found({"scenes/CIDEr": 1.0}), report=write_report)
    assert finished_results(cfg, start_at(path)) is not None
    changed = compose(f"output_dir={tmp_path}", "+trainer.max_time=00:00:01:00", change)
    assert finished_results(changed, start_at(path)) is None
    start_run_folder(changed, start_at(path).run)
    assert finished_results(changed, start_at(path)) is None
    assert not (tmp_path / "results.json").exists()  # they would stand for other weights
    assert f"the scores so far are in {tmp_path / 'earlier_results.json'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "earlier_results.json").read_text()) == {"scenes/CIDEr": 1.0}
    finish_run(tmp_path, Found({"scenes/CIDEr": 2.0}), report=write_report)
    assert finished_results(changed, start_at(path)) == {"scenes/CIDEr": 2.0}


def test_a_resumed_run_keeps_what_its_recipe_chose(tmp_path: Path) -> None:
    """A resume reads these values from `config.yaml`, and chooses none."""
    cfg = compose(f"output_dir={tmp_path}")
    start_run_folder(cfg, chosen=["init_from=photos  # the package's model knows the words"])
    path = save(tmp_path, 3)
    start_run_folder(cfg, start_at(path).run)
    kept = json.loads((tmp_path / "environment.json").read_text())["chosen"]
    assert kept == ["init_from=photos  # the package's model knows the words"]


def test_the_time_of_a_run_is_that_of_all_its_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder, "_began", None)
    for steps, hours, said in (
        (3, 1, r"took 1:0\d:\d\d; "),
        (4, 3, r"took 3:0\d:\d\d, 4:0\d:\d\d with its earlier starts; "),
    ):
        run_folder.begin_at(time.time() - 3600 * hours)
        run(tmp_path, *TRAINING_ALONE, "report=null", f"trainer.max_steps={steps}")
        assert re.search(rf"^{said}the run is in {tmp_path}$", capsys.readouterr().out, re.M)
    assert json.loads((tmp_path / "environment.json").read_text())["seconds"] == pytest.approx(4 * 3600, abs=600)


def write_report(folder: Path) -> None:
    (folder / "report.html").touch()


@pytest.mark.parametrize(("seconds", "ends"), [(60, True), (90, False), (None, False)])
def test_a_run_that_its_clock_ended_trains_on_with_more_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: int | None, ends: bool
) -> None:
    clock = [Timer({"seconds": seconds})] if seconds is not None else []
    trainer: Any = SimpleNamespace(max_epochs=4, max_steps=-1, callbacks=clock, should_stop=False)
    run = {"finished": True, "max_epochs": 4, "max_steps": -1, "max_time": 60.0}
    nothing: Any = None
    Checkpoints(tmp_path).on_load_checkpoint(trainer, nothing, {RUN_KEY: run})
    assert trainer.should_stop == ends
    assert ("only scores and report are made again" in capsys.readouterr().out) == ends


class Watch(L.Callback):
    """What each step is made with: its learning rates, weight decays and samples."""

    def __init__(self) -> None:
        self.rates: dict[int, set[float]] = {}
        self.decays: set[float] = set()
        self.keys: dict[int, Any] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        groups = trainer.optimizers[0].param_groups
        self.rates[trainer.global_step] = {group["lr"] for group in groups}
        self.decays |= {group["weight_decay"] for group in groups}
        self.keys[trainer.global_step] = batch.keys


@pytest.mark.parametrize("changed", [True, False])
def test_a_resumed_run_has_its_own_settings_from_the_first_step(tmp_path: Path, changed: bool) -> None:
    """Half a run, then the rest of one that is twice as long, with other numbers if they are `changed`."""
    words = (*TINY, *MAP, "report=null", "callbacks.checkpoint.every_n_steps=1")
    run(tmp_path, *words, "trainer.max_epochs=1", "callbacks.checkpoint.keep_last=9")
    numbers = ("model.optimizer.lr=1e-4", "model.optimizer.weight_decay=0.5") if changed else ()
    watch, lr = Watch(), 1e-4 if changed else 2e-3
    with watched(watch):
        run(tmp_path, *words, f"ckpt_path={tmp_path}/checkpoints/step_4.ckpt", *numbers)
    cosine = {step: 0.5 * (1 + math.cos(math.pi * (step - 2) / 10)) for step in range(4, 12)}
    assert {step: pytest.approx([lr * factor]) for step, factor in cosine.items()} == {
        step: [*rates] for step, rates in watch.rates.items()
    }
    assert watch.decays == {0.0, 0.5 if changed else 0.1}


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    """Also to a user who insists: of other names, of other shapes, and where others are trained."""
    words = (*TINY, *MAP, "report=null", "trainer.max_epochs=1")
    run(tmp_path / "one", *words)
    for word in (
        "lora.rank=4",
        "+model.net.embed_dim=24",
        "model.freeze=[image_encoder]",
        "model.contrastive_weight=0",
        "+model.optimizer.layer_decay=0.9",
    ):
        with pytest.raises(CheckpointError, match="other weights"):
            run(tmp_path / "other", *words, f"ckpt_path={tmp_path}/one/checkpoints/last.ckpt", word)


def test_weights_alone_are_not_resumed_and_move_no_run_away(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"w": torch.zeros(2)}}, tmp_path / "epoch_3.pt")
    save(tmp_path / "run", 3)
    with pytest.raises(CheckpointError, match=r"none of Lightning's checkpoints: init_from=.*epoch_3\.pt takes its"):
        run(tmp_path / "run", *TINY, *MAP, f"ckpt_path={tmp_path}/epoch_3.pt")
    assert not (tmp_path / "run" / "earlier_1").exists()


def test_a_checkpoint_of_lightning_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    words = (*TINY, *MAP, "report=null", "trainer.max_epochs=1")
    lightning = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, every_n_train_steps: 2, save_top_k: -1}"
    whole, rest = Watch(), Watch()
    with watched(whole):
        run(tmp_path / "whole", *words, f"callbacks.lightning={lightning}")
    (path,) = (tmp_path / "whole").rglob("epoch=0-step=2.ckpt")
    with watched(rest):
        run(tmp_path / "rest", *words, f"ckpt_path='{path}'")
    assert rest.keys == {step: keys for step, keys in whole.keys.items() if step >= 2}


def test_new_start_moves_the_old_run_aside(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\n")
    start_fresh(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert inspect(tmp_path / "earlier_1" / "checkpoints" / "step_3.ckpt")["global_step"] == 3
    assert (tmp_path / "earlier_1" / "metrics.csv").exists()


def test_what_an_unfinished_evaluation_wrote_is_not_that_of_the_next(tmp_path: Path) -> None:
    """It has neither checkpoints nor results, and the next one may be of another model."""
    for name in ("predictions", "samples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "flickr8k.json").write_text("[]")
    start_fresh(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"earlier_1"}
    assert (tmp_path / "earlier_1" / "samples" / "flickr8k.json").exists()


def test_going_back_to_an_older_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, logged_steps=step)
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\n1,0.9\n1,0.")
    (tmp_path / "bad_steps.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    rewind_run(tmp_path, start_at(tmp_path / "checkpoints" / "step_1.ckpt").run)
    assert (tmp_path / "earlier_1" / "checkpoints" / "step_2.ckpt").exists()
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,loss", "0,1.0"]
    assert (tmp_path / "bad_steps.jsonl").read_text() == '{"step": 0}\n'


@pytest.mark.parametrize(
    ("validating", "kept"), [(False, ["0,1.0,", "1,0.9,", "1,,0.8"]), (True, ["0,1.0,", "1,0.9,"])]
)
def test_a_validation_that_is_repeated_leaves_the_log(validating: bool, kept: list[str], tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss,val/loss\n0,1.0,\n1,0.9,\n1,,0.8\n2,0.7,\n")
    rewind_logs(tmp_path, logged_steps=2, step=2, validating=validating)
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,loss,val/loss", *kept]


@pytest.mark.parametrize(
    ("words", "saved", "said"),
    [
        (["seed=1"], False, "seed=1 name=demo/slurm_7"),
        (["name=mine", "seed=1"], True, "name=mine seed=1"),
        (["name=mine", "ckpt_path=null"], True, "name=mine"),
        (["name=mine", "ckpt_path=/a b.ckpt"], False, "name=mine 'ckpt_path=/a b.ckpt'"),
    ],
)
def test_the_command_that_resumes_names_the_run(
    words: list[str], saved: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the checkpoint that it began with, once it has its own."""
    if saved:
        save(tmp_path, 1)
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    assert resume_command("demo/slurm_7", tmp_path) == f"python train.py {said}"


def test_a_requeued_job_goes_on_at_its_own_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its command says, which is still that of its first start."""
    trunk, folder = tmp_path / "trunk", tmp_path / "branch"
    words = (*TRAINING_ALONE, "report=null", "model.warmup_steps=1")
    run(trunk, *words, "trainer.max_steps=1")
    start = f"ckpt_path={trunk}/checkpoints/step_1.ckpt"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run(folder, *words, start, "trainer.max_steps=2")
    assert not is_requeued(folder)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_requeued(folder)
    assert not is_requeued(trunk)  # of no job
    run(folder, *words, start, "trainer.max_steps=3")
    assert state(folder)["global_step"] == 3
    assert [row["step"] for row in rows(folder) if row["train/contrastive_loss"]] == ["1", "2"]
    run(folder, *words, "ckpt_path=null", "trainer.max_steps=3")  # nothing is left to do
    assert not (folder / "earlier_1").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert not is_requeued(folder)
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")  # torchrun starts all its processes again where one has failed
    start_run_folder(compose(*words, f"output_dir={folder}"), start_at(folder / "checkpoints" / "last.ckpt").run)
    assert not is_requeued(folder)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_requeued(folder)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # another job of that name begins
    with pytest.raises(ConfigError):
        run(folder, *words, "ckpt_path=null", "init_from=missing.ckpt")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not is_requeued(folder)

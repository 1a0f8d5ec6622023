"""Real processes, really killed: a run resumed from a checkpoint ends with the same bits as an undisturbed one."""

import copy
import csv
import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from forking import FORKSERVER, Program
from lightning.pytorch.callbacks import Timer
from running import NAFLEX, ROOT, compose, results, run, watched

from coca_lit.callbacks import Checkpoints, NonFiniteGuard
from coca_lit.callbacks.checkpoint import _announce
from coca_lit.cli.assembly import argument_defaults, plain
from coca_lit.cli.runtime import finish_run
from coca_lit.data.scenes.export import export_scenes
from coca_lit.data.scenes.render import scene_records
from coca_lit.errors import CheckpointError
from coca_lit.runs import checkpoint_io
from coca_lit.runs.checkpoint_io import inspect, newest_valid
from coca_lit.runs.resume import (
    FORMAT,
    RUN_KEY,
    changed_keys,
    check_same_run,
    find_checkpoint,
    resume,
    resume_keys,
    start_fresh,
)
from coca_lit.runs.run_folder import finished_results, start_run_folder
from coca_lit.runs.signals import requeue_while_starting
from coca_lit.training.checkpoint_plugin import SafeCheckpointIO

# Two epochs of six batches of the smallest network that has everything, validation and scores between.
TINY = (
    *("trainer=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=1"),
    *("trainer.val_check_interval=4", "data.batch_size=4", "model.warmup_steps=2", "name=test"),
    *("evals=[scenes_retrieval]", "scoring.images=4", "evals.scenes_retrieval.every=1"),
    *("+model.net.text_layers=1", "+model.net.decoder_layers=1", "model.net.dropout=0.2"),
)
MAP = ("data.train_count=24",)


class Die(L.Callback):
    """SIGKILL to its own process at the end of the batch that makes `batches` in all."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches:
            os.kill(os.getpid(), signal.SIGKILL)


def _train(folder: Path, overrides: tuple[str, ...], watch: L.Callback | None, environment: dict[str, str]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of workers, as usual; else they would start a fork server
    os.environ.update(environment)
    if "SUBMITIT_EXECUTOR" in environment:
        signal.signal(signal.SIGUSR2, _requeue_like_submitit)
    requeue_while_starting()  # the first thing that the command does
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = (folder.parent / f"{folder.name}.log").open("a", buffering=1)
    with watched(*[watch] if watch is not None else []):
        run(folder, *TINY, *overrides)


def _requeue_like_submitit(number: int, frame: Any) -> None:
    print("submitit was here")
    sys.exit(7)


def train(
    folder: Path, *overrides: str, watch: L.Callback | None = None, environment: dict[str, str] | None = None
) -> int:
    """Exit code of a run in a process of its own; what it says goes to FOLDER.log."""
    process = FORKSERVER.Process(target=_train, args=(folder, overrides, watch, environment or {}))
    process.start()
    process.join(600)
    assert process.exitcode is not None
    return process.exitcode


TIMES = ("samples/s", "train/data_wait", "train/scoring_share")  # are never the same


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(a: Path, b: Path) -> None:
    """Logs row by row, scores, and everything in the last checkpoint, bit by bit."""
    assert rows(a) == rows(b)
    assert results(a) == results(b)
    left, right = state(a), state(b)
    found = [{path.name: path.read_text() for path in folder.glob("checkpoints/best.json")} for folder in (a, b)]
    assert found[0] == found[1]
    assert left[RUN_KEY] == right[RUN_KEY]
    assert left["loops"] == right["loops"]
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0)
    assert left.get("current_model_state") is None or not torch.equal(
        left["current_model_state"]["net.logit_scale"], left["state_dict"]["net.logit_scale"]
    )
    torch.testing.assert_close(left.get("current_model_state"), right.get("current_model_state"), rtol=0, atol=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("shards")
    for i in range(3):
        export_scenes("shards", folder / str(i), count=10, size=32)
    return ("data=laion", f"data.shards={folder}/*/*.tar", "data.epoch_samples=24", "data.shuffle_buffer=4")


BY_STEPS = ("scoring.every_n_steps=2", "callbacks.checkpoint.best=scenes/t2i_median_rank", "scoring.quick=3")
# Every third batch is one of texts: its row has no loss of pairs, and no reward.
TEXTS_AND_REWARDS = (
    *("data.text={texts}", "data.text_every=3", "model.net.dropout=0"),
    "model.self_critical={_target_: coca_lit.training.self_critical.SelfCritical, samples: 2, max_length: 6}",
)
EMA_AND_ACCUMULATION = ("ema=0.9", "trainer.accumulate_grad_batches=2")
OF_ANY_SHAPE = (*NAFLEX, "data.batch_size=2", "trainer.accumulate_grad_batches=2")  # batches of two and of four images


@pytest.mark.parametrize(
    ("data", "workers", "extra"),
    [
        pytest.param("map", 0, (*BY_STEPS, *TEXTS_AND_REWARDS), marks=pytest.mark.slow),
        ("indexed", 2, EMA_AND_ACCUMULATION),
        pytest.param("stream", 2, EMA_AND_ACCUMULATION, marks=pytest.mark.slow),
        pytest.param("patches", 2, OF_ANY_SHAPE, marks=pytest.mark.slow),
    ],
)
def test_killed_twice_in_an_epoch(
    tmp_path: Path, request: pytest.FixtureRequest, data: str, workers: int, extra: tuple[str, ...]
) -> None:
    """Batch 3 is within an accumulation of two, 5 after the validation within the epoch, 12 the very last."""
    indexed = f"data.indexed={str(data in ('indexed', 'patches')).lower()}"
    source = MAP if data == "map" else (*request.getfixturevalue("shards"), indexed)
    texts = tmp_path / "texts.txt"  # of TEXTS_AND_REWARDS
    texts.write_text("".join(f"{record.captions[0]}\n" for record in scene_records("val", count=5)))
    extra = tuple(word.replace("{texts}", str(texts)) for word in extra)
    overrides = (*source, f"data.num_workers={workers}", "callbacks.checkpoint.every_n_steps=1", *extra)
    assert train(tmp_path / "whole", *overrides) == 0
    for batches in {"map": (3, 5, 12), "indexed": (3,), "stream": (5,), "patches": (3, 5)}[data]:
        assert train(tmp_path / "killed", *overrides, watch=Die(batches)) == -signal.SIGKILL
    assert train(tmp_path / "killed", *overrides) == 0
    assert_same(tmp_path / "whole", tmp_path / "killed")
    if data == "map":
        steps = [row for row in rows(tmp_path / "whole") if row["train/text_loss"] or row["train/policy_loss"]]
        of_texts = [bool(row["train/text_loss"]) for row in steps]
        assert of_texts == [False, False, True] * (len(steps) // 3)
        for row, text in zip(steps, of_texts, strict=True):
            assert [bool(row[f"train/{name}"]) for name in ("policy_loss", "reward", "contrastive_loss")] == [
                not text
            ] * 3


@pytest.mark.slow
def test_windows_of_a_store_are_resumed_with_other_workers(tmp_path: Path, shards: tuple[str, ...]) -> None:
    """Shards on a real S3 server: killed with two workers, then finished by one."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    from faulty_store import FaultyStore

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


class StopEarly(L.Callback):
    """Ends training with the batch that makes `batches` in all."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches


@pytest.mark.parametrize("batches", [3, 4, 6])
def test_a_run_that_had_ended_goes_on_where_it_was(tmp_path: Path, batches: int) -> None:
    """Within the accumulation of a step, which begins again, after the second step, or with the epoch."""
    overrides = (*TINY, *MAP, "trainer.accumulate_grad_batches=2", "trainer.limit_val_batches=0")
    overrides = (*overrides, "scoring.every_n_epochs=null", "model.cooldown_steps=0")
    run(tmp_path / "whole", *overrides)
    with watched(StopEarly(batches)):
        run(tmp_path / "longer", *overrides, "trainer.max_epochs=1")
    assert state(tmp_path / "longer")["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] == (batches == 6)
    run(tmp_path / "longer", *overrides)
    found, expected = state(tmp_path / "longer"), state(tmp_path / "whole")
    for progress in ("epoch_progress", "epoch_loop.batch_progress"):
        assert found["loops"]["fit_loop"][progress] == expected["loops"]["fit_loop"][progress]
    if batches == 3:  # the batch norms of the image encoder have seen it twice, and so have the final scores
        del found["state_dict"], expected["state_dict"]
    for name in found.keys() & {"state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"}:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    assert rows(tmp_path / "longer")[:-1] == rows(tmp_path / "whole")[:-1]


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
    for watch, code in (
        (SignalInValidation(2), 143),
        (Die(6), -signal.SIGKILL),
        (SignalInValidation(4), 143),
    ):
        assert train(tmp_path / "stopped", *overrides, watch=watch) == code
        assert state(tmp_path / "stopped")[RUN_KEY]["validating"]
    assert train(tmp_path / "stopped", *overrides) == 0
    assert_same(tmp_path / "whole", tmp_path / "stopped")


class Signal(L.Callback):
    """Sends signals to its own process during batch 2, on one rank."""

    def __init__(self, *numbers: int, rank: int = 0) -> None:
        self.numbers, self.rank = numbers, rank

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == 2 and trainer.global_rank == self.rank:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("numbers", "code"),
    [((signal.SIGTERM, signal.SIGTERM), 143), ((signal.SIGINT,), 130), ((signal.SIGUSR1,), 143)],
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
    if signal.SIGUSR1 in numbers:
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"
        assert "stopping after step 2 on signal 10: saved" in (tmp_path / "run.log").read_text()


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
    assert "note: 2 processes became 1: every batch holds the same samples" in said
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


# Files


def checkpoint(step: int = 1, **run: Any) -> dict[str, Any]:
    return {
        "state_dict": {"w": torch.full((50_000,), float(step))},
        "global_step": step,
        RUN_KEY: {"format": FORMAT, "step": step, **run},
    }


def save(folder: Path, step: int, **run: Any) -> Path:
    path = folder / "checkpoints" / f"step_{step}.ckpt"
    checkpoint_io.save(checkpoint(step, **run), path)
    return path


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


def test_a_resume_reads_its_checkpoint_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read, config = save(tmp_path, 1, config={"seed": 1}), checkpoint_io._read, {"seed": 1}
    found: list[Path] = []
    monkeypatch.setattr(checkpoint_io, "_read", lambda path: found.append(path) or read(path))
    last = find_checkpoint(tmp_path, "auto", first_process=True)
    assert last is not None
    check_same_run(last, config, strict=True)
    resume(tmp_path, last, roll_back=False)
    assert found == [path.resolve()]
    save(tmp_path, 1, config={"seed": 12345})
    with pytest.raises(CheckpointError, match=r"^seed was 12345 when "):
        check_same_run(last, config, strict=True)


def test_nothing_but_whole_files_under_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of writing, by an exception that nobody catches; the file before stays as it was."""
    path = save(tmp_path, 1)
    before = path.read_bytes()

    def half(content: Any, file: Any) -> None:
        file.write(b"PK half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_io.torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_io.save(checkpoint(2), path)
    assert path.read_bytes() == before


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    left = [path.with_name(".step_2.ckpt.99.tmp"), tmp_path / ".metrics.csv.99.tmp"]
    for file in left:
        file.write_bytes(b"PK half")
    start_run_folder(compose(f"output_dir={tmp_path}"), path)
    assert path.exists()
    assert not any(file.exists() for file in left)


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


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        checkpoint_io.save({"code": Die(1)}, tmp_path / "step_1.ckpt")
    assert not [*tmp_path.iterdir()]


# Configs and folders


def test_another_length_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    """The cosine of the learning rate ends elsewhere, so the steps that follow differ from the shorter run's."""
    trainer: Any = SimpleNamespace(global_step=3, current_epoch=0, max_epochs=4, max_steps=-1)
    _announce(trainer, {"max_epochs": 2, "max_steps": -1})
    assert capsys.readouterr().out.splitlines()[1:] == [
        "note: max_epochs was 2 and is now 4: from here on the learning rate follows it"
    ]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=7", "seed"),
        ("data.batch_size=16", "data.batch_size"),
        ("model.net.name=coca_vit_b32", "model.net.name"),
        ("model.optimizer.lr=1", "model.optimizer.lr"),
        ("experiment=finetune_mscoco", "image_size"),
        ("trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches"),
        ("init_from=/other.pt", "init_from"),
        ("init_parts.image_encoder=efficientnet_lite0", "init_parts.image_encoder"),
        ("callbacks.non_finite_guard.max_in_a_row=3", "callbacks.non_finite_guard.max_in_a_row"),
        ("callbacks.non_finite_guard=null", "callbacks.non_finite_guard"),
        ("callbacks.step_seeds=null", "callbacks.step_seeds"),
        ("callbacks.checkpoint.keep_last=9", None),
        ("data.num_workers=5", None),
        ("+data.store_patience=3600", None),
        ("trainer.max_epochs=9", None),
    ],
)
def test_changed_config_is_refused_by_its_key(tmp_path: Path, override: str, key: str | None) -> None:
    before, now = (resume_keys(plain(compose(f"output_dir={tmp_path}", *o))) for o in ((), (override,)))
    path = save(tmp_path, 1, config=before)
    if key is None:
        check_same_run(path, now, strict=True)
        return
    with pytest.raises(CheckpointError, match=rf"^{key} was ") as caught:
        check_same_run(path, now, strict=True)
    assert "\n" not in str(caught.value)
    check_same_run(path, now, strict=False)


def test_the_folder_of_own_records_may_change() -> None:
    before, now = ({"data": {"records": {"_target_": "mine", "root": root}}} for root in ("/a", "/b"))
    assert not [*changed_keys(before, now)]


@pytest.mark.parametrize("listed", [False, True])
def test_a_default_is_the_same_whether_a_config_lists_it_or_not(tmp_path: Path, listed: bool) -> None:
    words = ("model.label_smoothing=0.0", "data.objects=2", "model.optimizer.betas=[0.9,0.98]", "lora.alpha=16")
    configs = [resume_keys(plain(compose(f"output_dir={tmp_path}", *more))) for more in ((), words)]
    before, now = reversed(configs) if listed else configs
    path = save(tmp_path, 1, config=before)
    check_same_run(path, now, strict=True, defaults=argument_defaults(now))
    now["model"]["label_smoothing"] = 0.1
    with pytest.raises(CheckpointError, match=r"^model.label_smoothing was 0.0 when .* and is now 0.1: "):
        check_same_run(path, now, strict=True, defaults=argument_defaults(now))


def test_what_an_older_checkpoint_did_not_keep_is_not_compared(tmp_path: Path) -> None:
    now = resume_keys(plain(compose(f"output_dir={tmp_path}")))
    before = {key: value for key, value in now.items() if key not in ("callbacks", "init_from")}
    check_same_run(save(tmp_path, 1, config=before), now | {"init_from": "x"}, strict=True)


def test_keys_that_had_other_names(tmp_path: Path) -> None:
    words = ("init_parts.image_encoder=efficientnet_lite0", "model.net.contrastive=siglip")
    now = resume_keys(plain(compose(f"output_dir={tmp_path}", *words)))
    before = copy.deepcopy(now)
    before["image_weights"] = before.pop("init_parts")["image_encoder"]
    before["model"] |= {"contrastive": "siglip"}
    before["model"]["net"]["contrastive"] = "${model.contrastive}"
    path = save(tmp_path, 1, config=before)
    check_same_run(path, now, strict=True)
    now["model"]["net"]["contrastive"] = "softmax"
    with pytest.raises(CheckpointError, match=r"^model.net.contrastive was 'siglip' when .* and is now 'softmax': "):
        check_same_run(path, now, strict=True)


def test_checkpoints_of_an_earlier_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their config keys had other names, so nothing can be compared; when named, they load."""
    path = save(tmp_path, 1, format=1, config={"model": {"auxiliary": {}}})
    with pytest.raises(CheckpointError, match=r"another version of coca_lit.*set ckpt_path=\S+ to resume") as caught:
        check_same_run(path, {"model": {"objectives": {}}}, strict=True)
    assert "\n" not in str(caught.value)
    check_same_run(path, {"model": {"objectives": {}}}, strict=False)
    assert "note: " in capsys.readouterr().out
    weight = torch.zeros(1)
    before = {
        "callbacks": {"StepGuard": {"skipped": 2}, "SamplesSeen": {}},
        "state_dict": {"net.logit_scale": weight, "auxiliary.answers.head.bias": weight},
    }
    torch.save(before, tmp_path / "before.ckpt")
    assert SafeCheckpointIO().load_checkpoint(tmp_path / "before.ckpt") == {
        "callbacks": {"NonFiniteGuard": {"skipped": 2}, "SamplesSeen": {}},
        "state_dict": {"net.logit_scale": weight, "objectives.answers.head.bias": weight},
    }


@pytest.mark.parametrize("lost", ["nothing", "report.html", "results.json", "checkpoint"])
def test_finished_means_that_everything_is_there(tmp_path: Path, lost: str) -> None:
    """A full disk may have cost the last checkpoint although the scores were written, and a kill the report."""
    cfg = compose(f"output_dir={tmp_path}")
    path = save(tmp_path, 3, finished=lost != "checkpoint")
    start_run_folder(cfg, path)
    finish_run(tmp_path, {"scenes/CIDEr": 1.0}, {})
    (tmp_path / lost).unlink(missing_ok=True)
    cfg.scoring.objective = "scenes/CIDEr"  # ranks scores and computes none
    assert finished_results(cfg, path) == ({"scenes/CIDEr": 1.0} if lost == "nothing" else None)


@pytest.mark.parametrize("length", [("max_epochs", 9), ("max_steps", 9), ("max_time", "00:01:00:00")])
def test_a_longer_run_is_not_finished(tmp_path: Path, length: tuple[str, Any]) -> None:
    cfg = compose(f"output_dir={tmp_path}", "+trainer.max_time=00:00:01:00")
    path = save(tmp_path, 3, finished=True)
    start_run_folder(cfg, path)
    finish_run(tmp_path, {"scenes/CIDEr": 1.0}, {})
    assert finished_results(cfg, path) is not None
    cfg.trainer[length[0]] = length[1]
    assert finished_results(cfg, path) is None


@pytest.mark.parametrize(("seconds", "ends"), [(60, True), (90, False), (None, False)])
def test_a_run_that_its_clock_ended_trains_on_with_more_time(tmp_path: Path, seconds: int | None, ends: bool) -> None:
    clock = [Timer({"seconds": seconds})] if seconds is not None else []
    trainer: Any = SimpleNamespace(max_epochs=4, max_steps=-1, callbacks=clock, should_stop=False)
    run = {"finished": True, "max_epochs": 4, "max_steps": -1, "max_time": 60.0}
    nothing: Any = None
    Checkpoints(tmp_path).on_load_checkpoint(trainer, nothing, {RUN_KEY: run})
    assert trainer.should_stop == ends


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it is a folder; name the checkpoint in it"):
        find_checkpoint(tmp_path, str(tmp_path), first_process=True)


def test_new_start_moves_the_old_run_aside(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\n")
    start_fresh(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert inspect(tmp_path / "earlier_1" / "checkpoints" / "step_3.ckpt")["global_step"] == 3
    assert (tmp_path / "earlier_1" / "metrics.csv").exists()


def test_going_back_to_an_older_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, logged_steps=step)
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\n1,0.9\n1,0.")
    (tmp_path / "bad_steps.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    resume(tmp_path, tmp_path / "checkpoints" / "step_1.ckpt", roll_back=True)
    assert (tmp_path / "earlier_1" / "checkpoints" / "step_2.ckpt").exists()
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,loss", "0,1.0"]
    assert (tmp_path / "bad_steps.jsonl").read_text() == '{"step": 0}\n'

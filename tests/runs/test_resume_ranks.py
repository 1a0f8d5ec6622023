"""Runs of several processes that stop, resume with another number of them, or fail on one of them alone."""

import csv
import json
import shutil
import signal
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist

from coca_lit.distributed import rank
from coca_lit.errors import DataError, TrainingError
from coca_lit.runs.resume import RUN_KEY
from coca_lit.tools.prepare.command import data as coca_data
from coca_lit.tools.prepare.scenes import write_shards
from helpers.forking import FORKSERVER
from helpers.parallel import DDP, SHARDED, SHORT
from helpers.resuming import MAP, Signal, state, train_here
from helpers.running import launched, run, watched

pytestmark = pytest.mark.filterwarnings("ignore")
EVERY = ("callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep_last=20", "trainer.log_every_n_steps=1")
SIX = ("data.batch_size=6", "trainer.max_epochs=2", "trainer.strategy=ddp", *EVERY)  # two and three have equal parts


class Keys(L.Callback):
    """Notes the samples of this rank by the number of the optimizer step."""

    def __init__(self) -> None:
        self.keys: dict[int, list[str]] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.keys[trainer.global_step] = batch.keys


def train(folder: Path, overrides: tuple[str, ...], *more: L.Callback) -> tuple[dict[int, list[str]], str]:
    """Which samples this rank saw at each step, and what it said."""
    watch, said = Keys(), StringIO()
    with launched(), watched(watch, *more), redirect_stdout(said):
        run(folder, *SHORT, f"trainer.devices={dist.get_world_size()}", *overrides)
    return watch.keys, said.getvalue()


def shards(folder: Path) -> tuple[str, ...]:
    """Six shards of four samples."""
    (folder / "shards").mkdir()
    write_shards(folder / "shards", count=24, size=32, per_shard=4)
    source = ("data=laion", f"data.shards={folder}/shards/*.tar", "data.epoch_samples=24")
    return (*source, "data.num_workers=0")


def begun(folder: Path, source: Path, step: int) -> Path:
    """A run folder in which the run of another one has come as far as a step."""
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(source / "checkpoints" / f"step_{step}.ckpt", folder / "checkpoints")
    shutil.copy(source / "metrics.csv", folder)
    return folder


def global_batches(ranks: list[tuple[dict[int, list[str]], str]]) -> dict[int, list[str]]:
    return {step: sorted(key for keys, _ in ranks for key in keys[step]) for step in ranks[0][0]}


def losses(folder: Path) -> torch.Tensor:
    """A row for each step: its number and both losses."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/caption_loss"]]
    assert len({row["step"] for row in rows}) == len(rows)
    columns = ("step", "train/caption_loss", "train/contrastive_loss")
    return torch.tensor([[float(row[name]) for name in columns] for row in rows], dtype=torch.float64)


def train_from_s3(url: str, folder: Path, overrides: tuple[str, ...]) -> tuple[dict[int, list[str]], str]:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(names, (url, "k", "s", "us-east-1"), strict=True):
            patch.setenv(name, value)
        return train(folder, overrides)


def became_three(two: list[tuple[dict[int, list[str]], str]], three: list[tuple[dict[int, list[str]], str]]) -> None:
    assert "note: 2 processes became 3" in three[0][1]
    assert "same samples" in three[0][1]
    expected, found = global_batches(two), global_batches(three)
    assert list(expected) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found == {step: keys for step, keys in expected.items() if step > 3}


@pytest.mark.slow
def test_two_ranks_become_three(on_ranks, tmp_path: Path) -> None:
    """Same samples in every global batch, and the losses of the run that went on undisturbed."""
    overrides = (*shards(tmp_path), *SIX)
    two = on_ranks(2, train, tmp_path / "two", overrides)
    three = on_ranks(3, train, begun(tmp_path / "three", tmp_path / "two", 3), overrides)
    became_three(two, three)
    torch.testing.assert_close(losses(tmp_path / "three"), losses(tmp_path / "two"), rtol=1e-4, atol=0)
    assert state(tmp_path / "three")[RUN_KEY]["samples"] == 48


@pytest.mark.slow  # beside the windows of tests/data/shards
def test_two_ranks_become_three_that_read_from_a_store_on_another_machine(on_ranks, tmp_path: Path) -> None:
    """With a worker each, an empty cache, and a store that fails now and then."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    from helpers.faulty_store import FaultyStore

    _, _, *source = shards(tmp_path)
    coca_data(["check", str(tmp_path / "shards"), "--workers", "1"])
    source = ["data=laion", "data.shards=s3://bucket/set", "data.window=8", "data.readers=2", *source]
    store = FaultyStore()
    try:
        store.put("bucket", {f"set/{path.name}": path.read_bytes() for path in (tmp_path / "shards").iterdir()})
        overrides = (*source, *SIX, f"data.cache_dir={tmp_path}/cache2")
        two = on_ranks(2, train_from_s3, store.url, tmp_path / "two", overrides)
        store.faults.extend(["", "", "slow down", "", "reset", "cut", "", "internal"])
        elsewhere = (*source, *SIX, f"data.cache_dir={tmp_path}/cache3", "data.num_workers=1")
        three = on_ranks(3, train_from_s3, store.url, begun(tmp_path / "three", tmp_path / "two", 3), elsewhere)
    finally:
        store.close()
    became_three(two, three)
    assert not store.faults
    torch.testing.assert_close(losses(tmp_path / "three"), losses(tmp_path / "two"), rtol=1e-4, atol=0)


# Trouble on one rank


def refused_with_other_shards(folder: Path, epoch_samples: str) -> str:
    """On the second machine a shard is missing."""
    source = ("data=laion", f"data.shards={folder}/{rank()}/*.tar", "data.num_workers=0")
    with pytest.raises(DataError) as refused:
        train(folder / "run", (*source, f"data.epoch_samples={epoch_samples}", *SIX))
    return str(refused.value)


@pytest.mark.parametrize("epoch_samples", ["24", "null"])
def test_ranks_with_different_data_do_not_train(on_ranks, tmp_path: Path, epoch_samples: str) -> None:
    for machine in ("0", "1"):
        (tmp_path / machine).mkdir()
        write_shards(tmp_path / machine, count=24, size=32, per_shard=4)
    (tmp_path / "1" / "00003.tar").unlink()
    first, second = on_ranks(2, refused_with_other_shards, tmp_path, epoch_samples)
    assert first == second
    assert first.startswith("process 1 differs from the first in ")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def refused_elsewhere(folder: Path, overrides: tuple[str, ...]) -> str:
    """The second machine has another run folder."""
    with pytest.raises(DataError) as refused:
        train(folder / str(rank()) / "run", overrides)
    return str(refused.value)


def test_ranks_that_resume_beside_ranks_that_begin_do_not_train(on_ranks, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    source = shards(tmp_path / "data")
    on_ranks(2, train, tmp_path / "0" / "run", (*source, *SIX, "trainer.max_epochs=1"))
    said = on_ranks(2, refused_elsewhere, tmp_path, (*source, *SIX))
    assert (
        said
        == ["process 1 differs from the first in whether it resumes (is the run folder shared?): False, not True"] * 2
    )


class Trouble(L.Callback):
    """On one rank: gradients of some steps are not finite; after others an hour has passed. Notes all weights."""

    def __init__(self, on: int, not_finite: tuple[int, ...] = (), hour: tuple[int, ...] = ()) -> None:
        self.on, self.not_finite, self.hour = on, not_finite, hour
        self.weights: list[torch.Tensor] = []

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if rank() == self.on and trainer.global_step in self.not_finite:
            next(p.grad for p in module.parameters() if p.grad is not None).view(-1)[0] = float("nan")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        if rank() == self.on and trainer.global_step in self.hour:
            trainer.callbacks[0].state.due_at -= 3600


def troubled(folder: Path) -> tuple[list[torch.Tensor], dict[int, list[str]], str]:
    """Weights after each step, samples of each step, and why the other run stopped."""
    one_epoch = ("data.train_count=40", *DDP, "callbacks.checkpoint.keep_last=20")
    trouble = Trouble(on=0, not_finite=(2,), hour=(3,))
    keys, _ = train(folder / "one", one_epoch, trouble)
    in_a_row = (*one_epoch, "callbacks.non_finite_guard.max_in_a_row=2")
    with pytest.raises(TrainingError) as stopped:
        train(folder / "two", in_a_row, Trouble(on=1, not_finite=(0, 2, 3, 4)))
    return trouble.weights, keys, str(stopped.value)


@pytest.mark.slow
def test_trouble_of_one_rank_is_that_of_all(on_ranks, tmp_path: Path) -> None:
    """A step that is not finite there is skipped on both, two in a row stop both; both save when one finds it late."""
    ranks = on_ranks(2, troubled, tmp_path)
    (weights, *_), (others, *_) = ranks
    torch.testing.assert_close(weights, others, rtol=0, atol=0)
    assert [torch.equal(a, b) for a, b in pairwise(weights)] == [False, True, False, False]
    (line,) = (tmp_path / "one" / "bad_steps.jsonl").read_text().splitlines()
    entry = json.loads(line)
    keys = [key for _, keys, _ in ranks for key in keys[3]]
    assert (entry["step"], entry["reason"], entry["keys"]) == (2, "gradient not finite", keys)
    assert len(keys) == 8
    for *_, said in ranks:
        assert "the gradients of 2 steps in a row, 2 to 3, were not finite; nothing was applied" in said
    steps = [json.loads(line)["step"] for line in (tmp_path / "two" / "bad_steps.jsonl").read_text().splitlines()]
    assert steps == [0, 2, 3]
    saved = {path.name for path in (tmp_path / "one" / "checkpoints").glob("step_*")}
    assert saved == {"step_4.ckpt", "step_5.ckpt"}


@pytest.mark.slow
def test_signals_to_one_rank_save_once_and_end_all_with_143(tmp_path: Path) -> None:
    """They come after step 2; all ranks know with step 3."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun opens one
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    told |= {"TORCHELASTIC_RUN_ID": "x", "GLOO_SOCKET_IFNAME": "lo"}
    overrides = (*MAP, "trainer.strategy=ddp", "trainer.devices=2")
    processes = []
    for number in ("0", "1"):
        watch = Signal(signal.SIGTERM, signal.SIGTERM, rank=1)
        environment = told | {"RANK": number, "LOCAL_RANK": number}
        processes.append(FORKSERVER.Process(target=train_here, args=(tmp_path / "run", overrides, watch, environment)))
        processes[-1].start()
    for process in processes:
        process.join(600)
    said = (tmp_path / "run.log").read_text()
    assert [process.exitcode for process in processes] == [143, 143], said
    assert said.count("stopping after step 3 on signal 15: saved ") == 1
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["last.ckpt", "step_3.ckpt"]
    assert state(tmp_path / "run")[RUN_KEY]["samples"] == 12


# Sharded


def train_sharded(folder: Path) -> None:
    """A run, and a copy of it whose newest checkpoint has one wrong bit and whose results are not there yet."""
    overrides = ("data.train_count=24", *SHARDED, *EVERY)
    train(folder / "whole", overrides)
    if rank() == 0:
        damaged = begun(folder / "damaged", folder / "whole", 2) / "checkpoints" / "step_3.ckpt"
        content = bytearray((folder / "whole" / "checkpoints" / "step_3.ckpt").read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    dist.barrier()
    train(folder / "damaged", overrides)


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_newest_whole_checkpoint(on_ranks, tmp_path: Path) -> None:
    on_ranks(2, train_sharded, tmp_path)
    whole, damaged = state(tmp_path / "whole"), state(tmp_path / "damaged")
    assert whole[RUN_KEY] == damaged[RUN_KEY]
    torch.testing.assert_close(damaged["state_dict"], whole["state_dict"], rtol=0, atol=0)
    assert torch.equal(losses(tmp_path / "damaged"), losses(tmp_path / "whole"))

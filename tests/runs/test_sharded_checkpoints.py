"""Checkpoints that are folders: written by all ranks while training goes on, read by any number of them, or by one."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from coca_lit.distributed import rank, world_size
from coca_lit.errors import CheckpointError
from coca_lit.files import TEMPORARY, temporary_folder
from coca_lit.runs.checkpoint_io import inspect, newest_valid
from coca_lit.runs.resume import RUN_KEY
from coca_lit.training import sharding
from coca_lit.weights.load import load_model
from coca_lit.weights.sharded import REST, SHARDS, nested, read_tensors
from helpers.forking import FORKSERVER
from helpers.parallel import UNSCORED, saved
from helpers.running import launched, run

pytestmark = pytest.mark.filterwarnings("ignore")
ONE_FILE = ("trainer=fsdp", "trainer.accelerator=cpu")
FOLDERS = (*ONE_FILE, "trainer.strategy.sharded_checkpoints=true")
EVERY = ("callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep_last=20")
STEPS = (*UNSCORED, "evals=[]", "data.batch_size=6", "data.train_count=18", *EVERY)  # three steps


def content(folder: Path) -> dict[str, Any]:
    """What a folder holds, as if it were one file."""
    return nested(torch.load(folder / REST, weights_only=True), read_tensors(folder))


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def train(folder: Path, *overrides: str) -> None:
    with launched():
        run(folder, *STEPS, f"trainer.devices={world_size()}", *overrides)


def without_last_steps(folder: Path, source: Path, steps: int) -> Path:
    """A copy of a run that was killed after some steps, while the next checkpoint was written."""
    if rank() == 0:
        (folder / "checkpoints").mkdir(parents=True)
        for step in range(1, steps + 1):
            name = f"checkpoints/step_{step}.ckpt"
            shutil.copytree(source / name, folder / name)
        begun = temporary_folder(folder / "checkpoints" / f"step_{steps + 1}.ckpt")
        shutil.copytree(source / name, begun)
        (begun / TEMPORARY).touch()
        shutil.copy(source / "config.yaml", folder)
    dist.barrier()
    return folder


def damage(shard: Path) -> None:
    whole = bytearray(shard.read_bytes())
    whole[-5] ^= 1
    shard.write_bytes(whole)


def full_disk(self: Any, plan: Any, planner: Any, write: Any = sharding._Writer.write_data) -> Any:
    """Of the second rank."""
    if rank() == 1:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(self, plan, planner)


WEIGHT = torch.arange(10.0).view(5, 2)


def weights() -> torch.Tensor:
    """Of which each rank has a part."""
    return distribute_tensor(WEIGHT, init_device_mesh("cpu", (world_size(),)), [Shard(0)])


def write(folder: Path) -> None:
    """A checkpoint, and one for which the second rank has no room."""
    saving = sharding.Saving()
    for step, disk in ((1, sharding._Writer.write_data), (2, full_disk)):
        state = {0: {"exp_avg": 2 * weights(), "step": torch.tensor(3.0)}}
        content = {
            "state_dict": {"w": weights()},
            "optimizer_states": [{"state": state, "param_groups": []}],
            "of": step,
        }
        with mock.patch.object(sharding._Writer, "write_data", disk):
            saving.start(content, folder / f"step_{step}.ckpt")
            saving.finish()


def read(folder: Path) -> dict[str, Any]:
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros_like(weights()))
    found = sharding.restore(folder, model, [torch.optim.AdamW(model.parameters())])
    assert torch.equal(model.w.full_tensor(), WEIGHT)
    state = {
        name: x.full_tensor() if isinstance(x, DTensor) else x
        for name, x in found["optimizer_states"][0]["state"][0].items()
    }
    return {"of": found["of"], **state}


@pytest.fixture(scope="module")
def written(on_ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    on_ranks(2, write, folder)
    return folder


def test_a_full_disk_of_one_rank_costs_one_checkpoint(written: Path) -> None:
    assert [path.name for path in written.iterdir()] == ["step_1.ckpt"]
    assert inspect(written / "step_1.ckpt")["of"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_any_number_of_ranks_reads_what_two_have_written(on_ranks, written: Path, world: int) -> None:
    for found in on_ranks(world, read, written / "step_1.ckpt"):
        torch.testing.assert_close(found, {"of": 1, "exp_avg": 2 * WEIGHT, "step": torch.tensor(3.0)})
    whole = content(written / "step_1.ckpt")
    assert torch.equal(whole["state_dict"]["w"], WEIGHT)
    assert torch.equal(whole["optimizer_states"][0]["state"][0]["exp_avg"], 2 * WEIGHT)


def test_damage_is_found(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_4.ckpt"
    shutil.copytree(written / "step_1.ckpt", folder)
    first, second = sorted(folder.glob("*.safetensors"))
    damage(first)
    with pytest.raises(CheckpointError, match=f"step_4.ckpt is not a whole checkpoint: {first.name} is not what"):
        inspect(folder)
    second.unlink()
    with pytest.raises(CheckpointError, match=second.name):
        inspect(folder)
    (folder / SHARDS).unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        newest_valid(tmp_path)


# Whole runs


def two_ranks(folder: Path) -> None:
    """All runs of two ranks, in one process group."""
    train(folder / "file", *ONE_FILE)
    train(folder / "whole", *FOLDERS)
    resumed = without_last_steps(folder / "resumed", folder / "whole", 2)
    if rank() == 0:
        damage(next((resumed / "checkpoints" / "step_2.ckpt").glob("*.safetensors")))
    dist.barrier()
    train(resumed, *FOLDERS)


@pytest.fixture(scope="module")
def runs(on_ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    on_ranks(2, two_ranks, folder)
    return folder


def assert_same(found: dict[str, Any], expected: dict[str, Any], **tolerance: float) -> None:
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step"):
        torch.testing.assert_close(found[name], expected[name], **tolerance)


@pytest.mark.slow
def test_a_folder_holds_what_a_file_does(runs: Path) -> None:
    found, expected = content(last(runs / "whole")), saved(runs / "file")
    assert found.keys() == expected.keys()
    assert found[RUN_KEY]["finished"]
    assert_same(found, expected, rtol=0, atol=0)
    names = {path.name for path in last(runs / "whole").iterdir()}
    assert {REST, SHARDS} < names
    assert len(names) == 4  # a file of each rank
    assert inspect(last(runs / "whole"))[RUN_KEY] == found[RUN_KEY]


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(runs: Path) -> None:
    """Its newest checkpoint has one wrong bit, and the one after that is half written; both are written again."""
    inspect(runs / "resumed" / "checkpoints" / "step_2.ckpt")
    assert_same(content(last(runs / "resumed")), content(last(runs / "whole")), rtol=0, atol=0)
    left = sorted(path.name for path in (runs / "resumed" / "checkpoints").iterdir())
    assert left == ["last.ckpt", "step_1.ckpt", "step_2.ckpt", "step_3.ckpt"]


def three_ranks(folder: Path, source: Path) -> None:
    train(without_last_steps(folder, source, 2), *FOLDERS)


@pytest.mark.slow
def test_two_ranks_become_three_and_one(on_ranks, runs: Path, tmp_path: Path) -> None:
    """Sharded again, and as one process without sharding."""
    on_ranks(3, three_ranks, tmp_path / "three", runs / "whole")
    run(tmp_path / "one", *STEPS, f"ckpt_path={runs}/whole/checkpoints/step_2.ckpt")
    expected = content(last(runs / "whole"))["state_dict"]
    for found in (content(last(tmp_path / "three")), saved(tmp_path / "one")):
        torch.testing.assert_close(found["state_dict"], expected, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_a_model_is_loaded_from_a_folder(runs: Path) -> None:
    expected = load_model(last(runs / "file")).state_dict()
    for place in (last(runs / "whole"), runs / "whole"):
        torch.testing.assert_close(load_model(place).state_dict(), expected, rtol=0, atol=0)


def kill_at_step_3(temporary: Path, target: Path) -> None:
    """When its files are written, and not yet a checkpoint."""
    if target.name == "step_3.ckpt":
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace(temporary, target)


def train_alone(folder: Path) -> None:
    torch.set_num_threads(1)
    run(folder, *STEPS, *FOLDERS, "trainer.devices=1")


def die(folder: Path) -> None:
    with mock.patch.object(sharding, "durable_rename", kill_at_step_3):
        train_alone(folder)


def exit_code(target: Callable[[Path], None], folder: Path) -> int | None:
    """Of a process of its own."""
    process = FORKSERVER.Process(target=target, args=(folder,))
    process.start()
    process.join(600)
    return process.exitcode


@pytest.mark.slow
def test_a_kill_in_a_save_leaves_the_older_one(tmp_path: Path) -> None:
    """The process is really killed; another one resumes and ends with the bits of an undisturbed run."""
    assert exit_code(die, tmp_path / "killed") == -signal.SIGKILL
    found = newest_valid(tmp_path / "killed" / "checkpoints")
    assert found is not None
    assert found[0].name == "step_2.ckpt"
    for name in ("killed", "whole"):
        assert exit_code(train_alone, tmp_path / name) == 0
    assert_same(content(last(tmp_path / "killed")), content(last(tmp_path / "whole")), rtol=0, atol=0)

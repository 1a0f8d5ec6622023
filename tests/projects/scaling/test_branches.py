"""Runs of several lengths from one trunk."""

import json
from pathlib import Path

import pytest
import torch

from coca_lit.cli import train
from coca_lit.projects.scaling.branches import branch_of, cooldown_of
from helpers.running import compose, run


def test_where_a_run_starts(tmp_path: Path) -> None:
    longest, other = (tmp_path / f"seed=1,trainer.max_steps={steps}" for steps in (1600, 200))
    assert cooldown_of(200) == 40
    assert branch_of(str(longest), 1600, 1600) == "auto"
    assert branch_of(str(other), 200, 1600) == str(longest / "checkpoints" / "step_160.ckpt")
    (other / "checkpoints").mkdir(parents=True)
    (other / "checkpoints" / "step_170.ckpt").touch()
    assert branch_of(str(other), 200, 1600) == "auto"


def test_the_grid_is_found() -> None:
    assert compose("scaling=small", "model.net.embed_dim=48").model.net.text_width == 48


@pytest.mark.slow
def test_a_branch_of_the_grid_is_a_run_of_its_own(tmp_path: Path) -> None:
    """The longest run and a branch from it: the branch has the bits of a run that never saw the longest. Each batch
    ends an epoch and so makes a checkpoint; the ones that branches start from are still there.
    """
    options = (
        *("scaling=small", "model.net.embed_dim=48", "model.warmup_steps=2", "callbacks.checkpoint.every_n_steps=4"),
        *("trainer=cpu", "trainer.limit_val_batches=0", "data.batch_size=8", "data.train_count=8", "evals=[]"),
    )
    branching = "ckpt_path='${branch_of:${output_dir},${trainer.max_steps},12}'"
    for steps in (12, 5):
        folder = f"output_dir='{tmp_path}/trainer.max_steps={steps}'"
        train.run(compose(folder, "name=test", *options, f"trainer.max_steps={steps}", branching))
    run(tmp_path / "straight", *options, "trainer.max_steps=5", "ckpt_path=null")
    branch, straight = (tmp_path / name / "checkpoints" for name in ("trainer.max_steps=5", "straight"))
    found, expected = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (branch, straight))
    assert not (branch / "step_4.ckpt").exists()
    assert (straight / "step_4.ckpt").exists()
    assert found["global_step"] == expected["global_step"] == 5
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor), name
    samples = [json.loads((folder.parent / "environment.json").read_text())["samples"] for folder in (branch, straight)]
    assert samples == [40, 40]  # with the samples of the trunk, for the compute of a scaling law

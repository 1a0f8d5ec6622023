"""Runs of models for images of any shape, whose batches have several sizes."""

import signal
from pathlib import Path

import pytest

from coca_lit.tools.prepare.scenes import export_scenes
from helpers.family import check_sharded_training
from helpers.resuming import Die, assert_same, train
from helpers.scored_runs import check_experiment_on_scenes

# Makes of `coca_tiny` a model for images of any shape, and fills batches by a budget of patches.
NAFLEX = (
    *("++model.net.image_encoder=naflex", "+model.net.pooler=masked_cascade", "+model.net.text_tower=modern"),
    "++model.net.image_encoder_args={patch_size:8,pos_embed_grid_size:[3,3],embed_dim:24,depth:1,num_heads:2}",
    "+data.patches=[16,8]",
)


@pytest.mark.slow
def test_the_experiment_runs_on_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_experiment_on_scenes(monkeypatch, tmp_path, "pretrain_coca2_naflex_b32", *NAFLEX)


@pytest.mark.slow
def test_a_model_for_any_shape_is_sharded(on_ranks, tmp_path: Path) -> None:
    check_sharded_training(on_ranks, tmp_path, *NAFLEX)


@pytest.mark.slow
def test_killed_twice_in_an_epoch(tmp_path: Path) -> None:
    """Batch 3, of two or of four images, is within an accumulation of two, 5 after the validation within the epoch."""
    for i in range(3):
        export_scenes("shards", tmp_path / "shards" / str(i), count=10, size=32)
    overrides = (
        *("data=laion", f"data.shards={tmp_path}/shards/*/*.tar", "data.epoch_samples=24", "data.num_workers=2"),
        *(*NAFLEX, "data.batch_size=2", "trainer.accumulate_grad_batches=2", "model.caption_weight=0"),
        "callbacks.checkpoint.every_n_steps=1",
    )
    assert train(tmp_path / "whole", *overrides) == 0
    for batches in (3, 5):
        assert train(tmp_path / "killed", *overrides, watch=Die(batches)) == -signal.SIGKILL
    assert train(tmp_path / "killed", *overrides) == 0
    assert_same(tmp_path / "whole", tmp_path / "killed")

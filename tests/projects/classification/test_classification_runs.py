"""Runs that train a classifier of images, or on classes as texts."""

from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image

from coca_lit.cli.command import compose
from coca_lit.cli.module import build_module
from helpers.evaluated_runs import check_evaluations_follow
from helpers.running import TINY, results, run


def pooler_run(root: Path) -> tuple[str, ...]:
    """Writes photos of two classes; what trains a pooler on them."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    files = (f"data.root={root}", "data.num_workers=0", "init_from=null", "ema=null")
    return (*TINY, "experiment=finetune_classes", *files)


@pytest.mark.slow
def test_classification_by_a_pooler(tmp_path: Path) -> None:
    run(tmp_path / "run", *pooler_run(tmp_path / "classes"))
    assert set(results(tmp_path / "run")) == {"classes/accuracy"}


def test_a_pooler_trains_beside_a_frozen_network(tmp_path: Path) -> None:
    words = [*pooler_run(tmp_path / "classes"), "model.freeze=[image_encoder,pooling,text,decoder]"]
    run(tmp_path / "run", *words, "evals=[]", "model.warmup_steps=0", "ema=0.5")
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    cfg = compose("train", words)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    before = build_module(cfg).state_dict()
    assert state.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor) == name.startswith("net."), name


@pytest.mark.slow
def test_pairs_and_classes_as_texts(tmp_path: Path) -> None:
    run(tmp_path, *TINY, "data=scenes_and_classes", "evals=[scenes_zeroshot]")
    assert "scenes/top1" in results(tmp_path)


def test_the_evaluations_name_classes_as_the_run_did(tmp_path: Path) -> None:
    check_evaluations_follow(tmp_path, "classes", "classes", "imagenet")

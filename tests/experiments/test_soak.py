"""The soak itself: it really kills, it sees a single bit, and it counts what it did."""

import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helpers.running import ROOT


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # which the import sets
    from experiments.faults import soak

    return soak


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(soak: ModuleType, tmp_path: Path) -> None:
    overrides = (*soak.TINY, "data.train_count=16", "trainer.max_epochs=1", "trainer.limit_val_batches=0")
    runs = []
    for name in ("whole", "killed"):
        runs.append(soak.Run(tmp_path / name, tmp_path / "none", overrides, random.Random(0)))
        if name == "killed":
            runs[-1].start(soak.Trouble(die_in_save=(1, 0.5)))
            assert runs[-1].ends(-9) == ""
            assert not runs[-1].checkpoints()
        runs[-1].start()
        assert runs[-1].ends() is None, runs[-1].said()
    assert (runs[0].kills, runs[1].kills) == (0, 1)
    assert soak.difference(runs[0].folder, runs[1].folder) == ""
    last = runs[1].checkpoints()[-1]
    content: dict[str, Any] = torch.load(last, weights_only=True)
    content["state_dict"]["net.logit_scale"].view(torch.int32)[...] ^= 1
    torch.save(content, last)
    assert soak.difference(runs[0].folder, runs[1].folder) == "last.ckpt: /state_dict/net.logit_scale"

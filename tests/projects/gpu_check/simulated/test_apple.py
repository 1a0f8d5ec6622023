"""An Apple GPU, simulated: commands and trainings find it, and nothing asks it for float64 or pinned memory."""

import copy
import platform
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from simulated_gpu import DEVICE, KIND, SimulatedGpu, on_cpu, to_gpu
from subjects import TINY, images, small_net, weights

from coca_lit.distributed import process_group
from coca_lit.training.gradient_caching import seeded
from helpers.running import run, watched, without_java

pytestmark = [
    pytest.mark.skipif(KIND != "mps", reason="for the device of Apple"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def apple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "arm")  # by which Lightning knows it


def test_captions_are_those_of_the_cpu() -> None:
    net = small_net()
    gpu = to_gpu(copy.deepcopy(net))
    for options in ({}, {"strategy": "beam", "num_beams": 3}, {"strategy": "beam", "rerank": "contrastive"}):
        with SimulatedGpu(), process_group() as device:
            assert device == torch.device("mps")
            found = gpu.generate(images().to(device), max_length=12, **options)
        assert torch.equal(on_cpu(found), net.generate(images(), max_length=12, **options))


def test_a_run_is_that_of_the_cpu_and_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = ("evals=[scenes_captions,scenes_retrieval,scenes_probe]", "scoring.images=4")
    setup += ("trainer.micro_batch_size=4", "model.net.dropout=0.1")
    without_java(monkeypatch)
    found: dict[str, torch.device] = {}

    class Device(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            found["device"] = pl_module.device

    with SimulatedGpu(), watched(Device()):
        scores = run(tmp_path / "gpu", *TINY, *setup, "trainer.accelerator=auto", "trainer.precision=auto")
    assert found["device"].type == "mps"
    expected = run(tmp_path / "cpu", *TINY, *setup)
    assert scores.keys() == expected.keys()
    torch.testing.assert_close(weights(tmp_path / "gpu"), weights(tmp_path / "cpu"), atol=2e-4, rtol=0)


def test_random_numbers_go_on_after_a_block() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with seeded(5, DEVICE):
        torch.rand(7)
    assert torch.equal(torch.rand(2), expected)

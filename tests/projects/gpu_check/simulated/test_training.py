"""Whole runs on Lightning's CUDA accelerator, whose GPU is simulated: the same as on the CPU, and nothing waits."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from recorded_runs import on_gpu, recorded_steps
from simulated_gpu import Recorder, SimulatedGpu
from subjects import TINY, weights

from coca_lit.data.batch import Batch
from coca_lit.data.loader import TrainLoader
from helpers.running import run, watched, without_java

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    return recorded_steps(monkeypatch)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpu")
    run(folder, *TINY)
    return folder


def test_a_run_in_fp32_equals_that_on_the_cpu(tmp_path: Path, on_cpu: Path, steps: list[Recorder]) -> None:
    on_gpu(tmp_path, "trainer.precision=32-true")
    torch.testing.assert_close(weights(tmp_path), weights(on_cpu), atol=2e-4, rtol=0)
    assert len(steps) == 7
    for step in steps[1:-1]:  # values to log are made in the first, and read in the last
        assert not step.waits, dict(step.waits)


SETUPS: dict[str, tuple[str, ...]] = {
    "bf16": ("trainer.precision=bf16-mixed",),
    "fp16": ("trainer.precision=16-mixed",),
    "fp16 without clipping": ("trainer.precision=16-mixed", "trainer.gradient_clip_val=null"),
    "bf16 weights": ("trainer.precision=bf16-true",),
    "micro-batches": ("trainer.precision=bf16-mixed", "trainer.micro_batch_size=4"),
    "adapters": ("lora.rank=2",),
    "clip": ("+model.net.decoder_layers=0",),
    "questions": ("data=scenes_vqa", "model=coca_answers", "vocabulary=1"),
    "convolutions": ("~model.net.image_encoder", "~model.net.image_encoder_args"),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_every_setup_trains_without_waiting(setup: str, tmp_path: Path, steps: list[Recorder]) -> None:
    on_gpu(tmp_path, *SETUPS[setup])
    content = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] >= 3
    assert all(x.isfinite().all() for x in content["state_dict"].values() if x.is_floating_point())
    for step in steps[1:-1]:
        assert not step.waits, dict(step.waits)


def test_accumulated_gradients(tmp_path: Path, steps: list[Recorder]) -> None:
    on_gpu(tmp_path, "trainer.accumulate_grad_batches=2", "model.caption_weight=0", "trainer.max_steps=3")
    assert len(steps) == 6
    for batch in steps[2:-2]:
        assert not batch.waits, dict(batch.waits)


def test_averaged_weights_are_those_of_the_cpu(tmp_path: Path) -> None:
    """PyTorch's average reads its count from the device in every step."""
    run(tmp_path / "cpu", *TINY, "ema=0.9")
    on_gpu(tmp_path / "gpu", "ema=0.9", "trainer.precision=32-true")
    torch.testing.assert_close(weights(tmp_path / "gpu"), weights(tmp_path / "cpu"), atol=2e-4, rtol=0)


def test_a_batch_is_sent_before_the_one_before_it_is_computed() -> None:
    events: list[str] = []

    class Sent(Batch):
        def to(self, device: torch.device) -> Batch:
            events.append(f"sent {self.keys[0]}")
            return super().to(device)

    made = [Sent(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.ones(1, 2), torch.ones(1), [str(i)]) for i in "012"]
    loader = TrainLoader(3, lambda epoch, done: made, lambda: (0, 0))
    loader.device = torch.device("cuda", 0)
    with SimulatedGpu():
        for batch in loader:
            events.append(f"computed {batch.keys[0]}")
            assert batch.images.device.type == "cuda"
    assert events == ["sent 0", "sent 1", "computed 0", "sent 2", "computed 1", "computed 2"]


class Spoil(L.Callback):
    """Makes the gradient of one step infinite."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 3:
            next(p.grad for p in pl_module.parameters() if p.grad is not None).fill_(float("inf"))


def test_a_step_that_is_not_finite_is_skipped_by_the_device(tmp_path: Path, steps: list[Recorder]) -> None:
    with watched(Spoil()):
        run(tmp_path / "cpu", *TINY)
        steps.clear()
        on_gpu(tmp_path / "gpu", "trainer.precision=32-true")
    torch.testing.assert_close(weights(tmp_path / "gpu"), weights(tmp_path / "cpu"), atol=2e-4, rtol=0)
    bad = [json.loads((tmp_path / name / "bad_steps.jsonl").read_text()) for name in ("cpu", "gpu")]
    assert bad[0] == bad[1]
    assert bad[0]["step"] == 3
    assert not any(step.waits for step in steps[1:-1])


class Break(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            raise RuntimeError("broken")


def test_a_broken_run_resumes_where_it_stopped(tmp_path: Path, on_cpu: Path) -> None:
    with watched(Break()), pytest.raises(RuntimeError, match="broken"):
        on_gpu(tmp_path, "trainer.precision=32-true")
    on_gpu(tmp_path, "trainer.precision=32-true")
    torch.testing.assert_close(weights(tmp_path), weights(on_cpu), atol=2e-4, rtol=0)


def test_a_run_is_validated_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_java(monkeypatch)
    scored = (
        "evals=[scenes_captions,scenes_retrieval,scenes_zeroshot]",
        "scoring.images=8",
        "trainer.limit_val_batches=1",
    )
    found = on_gpu(tmp_path / "gpu", *scored, "trainer.precision=32-true", "trainer.max_steps=2")
    expected = run(tmp_path / "cpu", *TINY, *scored, "trainer.max_steps=2")
    assert found.keys() == expected.keys()

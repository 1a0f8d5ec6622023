"""Token dropping: what is drawn, when, and that a run with it goes on as it would have."""

from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

from coca_lit.lit_module import CoCaLit
from coca_lit.models import create_model
from coca_lit.projects.token_dropping.callback import TokenDropping, drawn_tokens
from coca_lit.testing import own_batch
from coca_lit.training.optim import AdamW
from helpers.running import run


@pytest.mark.parametrize(("share", "kept"), [(0.35, 7), (0.5, 10), (1.0, 20), (0.001, 1)])
def test_tokens_are_drawn_without_replacement(share: float, kept: int) -> None:
    numbers = torch.arange(20).repeat(500, 1)[..., None]  # each token is its number
    drawn = drawn_tokens(numbers, share)[..., 0]  # (B, K)
    assert drawn.shape == (500, kept)
    assert all(len(set(row)) == kept for row in drawn.tolist())
    counts = drawn.flatten().bincount(minlength=20)
    expected = 500 * kept / 20
    assert ((counts - expected).abs() <= 6 * expected**0.5).all()


def test_only_the_decoder_and_only_in_training() -> None:
    module = CoCaLit(create_model("coca_tiny"), AdamW(lr=1e-3))
    net = module.net
    batch = own_batch(net, 0)
    count = net.encode_image_tokens(batch.images).shape[1]
    features = net.eval().encode_image(batch.images)
    dropping = TokenDropping(share=0.25)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    dropping.on_fit_start(trainer, module)
    assert net.encode_image_tokens(batch.images).shape[1] == count
    torch.testing.assert_close(net.encode_image(batch.images), features)
    net.train()
    assert net.encode_image_tokens(batch.images).shape[1] == round(count / 4)
    dropping.on_fit_end(trainer, module)
    assert net.encode_image_tokens(batch.images).shape[1] == count


@pytest.mark.slow
def test_a_resumed_run_drops_the_same_tokens(tmp_path: Path) -> None:
    shared = ("experiment=scenes_token_dropping", "trainer=smoke", "evals=[]")
    weights = []
    for name, stops in (("whole", [4]), ("resumed", [2, 4])):
        for stop in stops:
            run(
                tmp_path / name, *shared, f"trainer.max_steps={stop}", "+model.cooldown_steps=0", "model.warmup_steps=1"
            )
        saved = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        weights.append(saved["state_dict"])
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())

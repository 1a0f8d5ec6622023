"""The loss of caption tokens, against loops over images and tokens."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coca_lit import load_model, save_model
from coca_lit.models import CoCa, create_model
from coca_lit.projects.superclip.objective import CaptionTokens
from coca_lit.testing import ENCODER, check_two_ranks_and_micro_batches, own_batch, trained_with
from helpers.running import run


def made() -> tuple[CoCa, CaptionTokens]:
    torch.manual_seed(0)
    net = create_model("coca_tiny", **ENCODER)
    objective = CaptionTokens()
    objective.build(net)
    return net, objective.train()


def test_loss_by_hand() -> None:
    """Two steps: the weights of the second know the captions of both."""
    net, objective = made()
    seen: list[list[set[int]]] = []
    for step in range(2):
        batch = own_batch(net, step)
        captions = [
            set(row[1 : length - 1]) for row, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)
        ]
        seen.append(captions)
        with torch.no_grad():
            out = net(batch.images, batch.tokens, batch.lengths, needs=objective.needs)
            found = objective(net, batch, out)["caption_tokens"].item()
            scores = objective.classifier(out.pooled).log_softmax(dim=1)
        count = len(captions)
        total = 0.0
        for row, caption in zip(scores, captions, strict=True):
            weights: dict[int, float] = {}
            for token in caption:
                frequency = sum(sum(token in other for other in others) / count for others in seen)
                weights[token] = math.log((len(seen) + 1 / count) / (frequency + 1 / count))
            whole = sum(weights.values())
            total -= sum(weight / whole * row[token].item() for token, weight in weights.items())
        assert found == pytest.approx(total / count, rel=1e-5)


def test_validation_does_not_count() -> None:
    net, objective = made()
    batch = own_batch(net, 0)
    out = net(batch.images, batch.tokens, batch.lengths, needs=objective.needs)
    objective.eval()(net, batch, out)
    assert objective.steps == 0
    assert not objective.frequencies.any()


def trained(micro_batch_size: int | None, weight: float = 0.7) -> dict[str, Tensor]:
    objective = CaptionTokens(weight)
    weights = trained_with(objective, own_batch, 1.0, micro_batch_size)
    return {**weights, "frequencies": objective.frequencies, "steps": objective.steps}


def test_two_ranks_and_micro_batches(on_ranks) -> None:
    check_two_ranks_and_micro_batches(on_ranks, trained)


def test_it_is_kept_with_the_model(tmp_path: Path) -> None:
    net, objective = made()
    net.objectives = {"superclip": objective}
    save_model(net, tmp_path / "model.safetensors")
    kept = load_model(tmp_path / "model.safetensors").objectives["superclip"]
    torch.testing.assert_close(dict(kept.state_dict()), dict(objective.state_dict()))


@pytest.mark.slow
def test_a_run_and_its_continuation(tmp_path: Path) -> None:
    """The frequencies go on where the checkpoint left them."""
    shared = ("experiment=scenes_superclip", "trainer=smoke", "evals=[]")
    run(tmp_path, *shared)
    run(tmp_path, *shared, "trainer.max_steps=4")
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert saved["objectives.superclip.steps"] == 4

"""Self-distillation: the teacher's average, its targets and their mean, crops and masks, and a few steps."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.models import CoCa, create_model
from coca_lit.testing import ENCODER, own_batch
from experiments.self_distillation.objective import SelfDistillation, local_crops, random_cells, with_masked
from helpers.running import run


def build(**options: float) -> tuple[CoCa, SelfDistillation]:
    torch.manual_seed(0)
    net = create_model("coca_tiny", **ENCODER).train()
    objective = SelfDistillation(prototypes=7, **options)
    objective.build(net)
    return net, objective.train()


def test_the_terms_by_hand() -> None:
    net, objective = build(momentum=0.75)
    batch, encoder = own_batch(net, 0), net.image_encoder
    objective.follow(net)
    torch.nn.init.normal_(objective.mean)
    mean = objective.mean.clone()
    torch.manual_seed(1)
    found = objective(net, batch)
    torch.manual_seed(1)
    crops = local_crops(batch.images)
    cells = random_cells(6, 16, 0.5, torch.device("cpu"))
    branch = objective.head

    def logits(tokens: Tensor) -> Tensor:
        return F.cosine_similarity(branch.head(tokens)[..., None, :], branch.prototypes.weight, dim=-1)

    whole, cropped, masked = (encoder(images) for images in (batch.images, crops, with_masked(batch.images, cells)))
    local = []
    for i in range(6):
        target = ((logits(whole[i].mean(0)) - mean[0]) / 0.04).softmax(-1)
        local.append(-(target * (logits(cropped[i].mean(0)) / 0.1).log_softmax(-1)).sum())
    tokens = []
    for i, cell in cells.nonzero().tolist():
        target = ((logits(whole[i, 1 + cell]) - mean[1]) / 0.04).softmax(-1)  # after the class token
        tokens.append(-(target * (logits(masked[i, 1 + cell]) / 0.1).log_softmax(-1)).sum())
    assert len(tokens) == 6 * 8
    assert found["local"].item() == pytest.approx(torch.stack(local).mean().item(), rel=1e-4)
    assert found["masked"].item() == pytest.approx(torch.stack(tokens).mean().item(), rel=1e-4)
    outputs = logits(whole)
    expected = torch.stack([logits(whole.mean(1)).mean(0), outputs.mean((0, 1))])
    torch.testing.assert_close(objective.mean, 0.9 * mean + 0.1 * expected, atol=1e-5, rtol=0)


def test_the_teacher_follows_and_gets_no_gradient() -> None:
    net, objective = build(momentum=0.75)
    objective.follow(net)
    teacher = dict(objective.teacher.encoder.named_parameters())
    before = {name: p.clone() for name, p in net.image_encoder.named_parameters()}
    torch.testing.assert_close(teacher, before)
    with torch.no_grad():
        for p in net.image_encoder.parameters():
            p.add_(1)
    objective.follow(net)
    torch.testing.assert_close(teacher, {name: p + 0.25 for name, p in before.items()})
    sum(objective(net, own_batch(net, 0)).values()).backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert all(p.grad is not None for p in objective.head.parameters())
    assert net.image_encoder.trunk.patch_embed.proj.weight.grad.abs().max() > 0
    resting = {name: p.clone() for name, p in objective.teacher.named_parameters()}, objective.mean.clone()
    objective.eval()(net, own_batch(net, 1))
    torch.testing.assert_close((dict(objective.teacher.named_parameters()), objective.mean), resting)


def test_batch_norms_remember_whole_images_alone() -> None:
    torch.manual_seed(0)
    net, objective = create_model("coca_tiny").train(), SelfDistillation(prototypes=7)
    objective.build(net)
    before = {name: x.clone() for name, x in net.image_encoder.named_buffers() if "num_batches" not in name}
    objective.train()(net, own_batch(net, 0))
    torch.testing.assert_close({name: dict(net.image_encoder.named_buffers())[name] for name in before}, before)
    assert {norm.momentum for norm in net.modules() if isinstance(norm, torch.nn.BatchNorm2d)} == {0.1}


def mean_after_a_step() -> Tensor:
    net, objective = build(momentum=0.5)
    objective.follow(net)
    objective.targets(own_batch(net, 0).images)
    return objective.mean


@pytest.mark.slow
def test_ranks_share_one_mean(on_ranks) -> None:
    expected = mean_after_a_step()
    assert expected.abs().max() > 0
    for found in on_ranks(2, mean_after_a_step):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_crops_and_masks() -> None:
    ramp = torch.linspace(0, 255, 64).round().to(torch.uint8).expand(50, 3, 64, 64)  # brighter to the right
    crops = local_crops(ramp).float()
    spans = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]) / 255  # the width of each part
    assert spans.min() > 0.2**0.5 - 0.05
    assert spans.max() < 0.5**0.5 + 0.05
    assert (crops[:, :, 0] - crops[:, :, -1]).abs().max() <= 1
    both = local_crops(torch.stack([ramp[:, 0], ramp[:, 0].mT, ramp[:, 0]], dim=1)).float()  # and to the bottom
    centres = both[:, :2].mean(dim=(2, 3)) / 255  # of each part, (50, 2)
    assert (centres.amin(dim=0) < 0.35).all()
    assert (centres.amax(dim=0) > 0.65).all()
    assert abs(centres.T.corrcoef()[0, 1]) < 0.5
    cells = random_cells(50, 16, 0.3, torch.device("cpu"))
    assert set(cells.sum(dim=1).tolist()) == {5}
    assert len(set(map(tuple, cells.tolist()))) > 20
    masked = with_masked(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.arange(16)[None] == 6)  # row 1, column 2
    assert masked[0, 0].nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]


@pytest.mark.slow
def test_a_few_steps(tmp_path: Path) -> None:
    words = (
        *("trainer=cpu", "data.train_count=32", "data.batch_size=8", "evals=[]", "model.warmup_steps=2"),
        *("trainer.limit_val_batches=0", "trainer.precision=32-true"),
        "+model.objectives.own._target_=experiments.self_distillation.objective.SelfDistillation",
    )
    run(tmp_path / "whole", *words, "trainer.max_steps=8", "trainer.max_epochs=2")
    saved = torch.load(tmp_path / "whole" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    moved = [
        saved[name] - saved[name.replace("objectives.own.teacher.encoder", "net.image_encoder")]
        for name in saved
        if name.startswith("objectives.own.teacher.encoder") and name.endswith("weight")
    ]
    assert 0 < max(difference.abs().max() for difference in moved) < 0.1

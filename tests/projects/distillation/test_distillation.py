"""Distillation against double loops in plain Python, autograd of the whole batch, two ranks and micro-batches."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.data.batch import Batch, Example, collate
from coca_lit.distributed import rank, world_size
from coca_lit.errors import ConfigError
from coca_lit.lit_module import CoCaLit
from coca_lit.losses import contrastive_loss, loss_terms
from coca_lit.models import create_model
from coca_lit.projects.distillation.loss import Teacher, distillation_loss
from coca_lit.projects.distillation.objective import Distillation
from coca_lit.projects.distillation.reinforced import as_extras, teachers_of
from coca_lit.testing import ENCODER, PAIRS, check_two_ranks_and_micro_batches, own_batch, trained_with
from coca_lit.training.objectives import terms_of
from coca_lit.training.optim import AdamW

WIDTHS, SCALES = (5, 3), (20.0, 7.0)


def unit(seed: int, width: int, count: int = PAIRS) -> Tensor:
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1)


def teachers(own: slice = slice(None)) -> tuple[Teacher, ...]:
    sides = [(unit(10 + k, width), unit(20 + k, width)) for k, width in enumerate(WIDTHS)]
    return tuple(Teacher(i[own], t[own], s) for (i, t), s in zip(sides, SCALES, strict=True))


def batch_extras(taught: tuple[Teacher, ...]) -> dict[str, Any]:
    """Of a batch that carries what these teachers say."""
    extras = as_extras(taught)
    return extras | {"teachers.scales": [extras["teachers.scales"]] * len(taught[0].images)}


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(x) for x in row]
    return [power / sum(powers) for power in powers]


def by_hand(images: Tensor, texts: Tensor, scale: float, taught: tuple[Teacher, ...]) -> float:
    """Equations 2 to 4 of the paper, one pair at a time."""

    def rows(queries: list[list[float]], candidates: list[list[float]], factor: float) -> list[list[float]]:
        return [softmax([factor * sum(x * y for x, y in zip(q, c, strict=True)) for c in candidates]) for q in queries]

    total = 0.0
    for teacher in taught:
        student, truth = (images.tolist(), texts.tolist()), (teacher.images.tolist(), teacher.texts.tolist())
        for one, other in ((0, 1), (1, 0)):
            p_rows = rows(truth[one], truth[other], teacher.logit_scale)
            q_rows = rows(student[one], student[other], scale)
            for p_row, q_row in zip(p_rows, q_rows, strict=True):
                total += sum(p * math.log(p / q) for p, q in zip(p_row, q_row, strict=True))
    return total / (2 * len(images) * len(taught))


def plain(images: Tensor, texts: Tensor, scale: Tensor, taught: tuple[Teacher, ...]) -> Tensor:
    """On all pairs at once, differentiated by autograd."""
    found = []
    for teacher in taught:
        logits, truth = scale * images @ texts.T, teacher.logit_scale * teacher.images @ teacher.texts.T
        for q, p in ((logits, truth), (logits.T, truth.T)):
            found.append(F.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="batchmean"))
    return torch.stack(found).mean()


@pytest.mark.parametrize("tile", [1, 4, 100])
def test_the_loss_equals_double_loops_and_its_gradients_autograd(tile: int) -> None:
    sides = [unit(k, 4).requires_grad_() for k in range(2)]
    inputs = (*sides, torch.tensor([9.0], dtype=torch.float64, requires_grad=True))
    found = distillation_loss(*inputs, teachers(), tile)
    assert found.item() == pytest.approx(by_hand(*sides, 9.0, teachers()), abs=1e-12)
    assert distillation_loss(*(x.detach() for x in inputs), teachers(), tile).item() == pytest.approx(found.item())
    expected = torch.autograd.grad(plain(*inputs, teachers()), inputs)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), expected, atol=1e-12, rtol=0)


def test_a_student_that_is_its_teacher_has_no_loss_and_a_certain_teacher_teaches_the_pairs() -> None:
    images, texts = unit(0, 4), unit(1, 4)
    same = (Teacher(images, texts, 9.0),)
    assert distillation_loss(images, texts, torch.tensor([9.0]).double(), same).item() == pytest.approx(0, abs=1e-12)
    certain = torch.eye(PAIRS, dtype=torch.float64)
    found = distillation_loss(images, texts, torch.tensor([9.0]).double(), (Teacher(certain, certain, 100.0),))
    assert found.item() == pytest.approx(contrastive_loss(images, texts, torch.tensor([9.0]).double()).item(), abs=1e-9)


# In the training step


def trained(micro_batch_size: int | None, weight: float = 0.7) -> dict[str, Tensor]:
    """Weights after two steps on this rank's part of each batch."""
    share = PAIRS // world_size()
    taught = teachers(slice(rank() * share, (rank() + 1) * share))
    return trained_with(
        Distillation(weight),
        lambda net, i: own_batch(net, i)._replace(extras=batch_extras(taught)),
        0.3,
        micro_batch_size,
    )


def test_two_ranks_and_micro_batches_train_as_one_process_with_the_whole_batch(on_ranks) -> None:
    check_two_ranks_and_micro_batches(on_ranks, trained)


@pytest.mark.parametrize("weights", [(0.3, 2.0), (0.0, 0.0)])
def test_it_is_added_to_the_losses_of_one_pass(weights: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = create_model("coca_tiny", **ENCODER)
    module = CoCaLit(net, AdamW(lr=0.0), 0, *weights, objectives={"teach": Distillation(0.7)})
    batch = own_batch(net, 0)._replace(extras=batch_extras(teachers()))
    out, seen, logged = net(*batch[:3]), [], {}
    handle = net.register_forward_hook(lambda *_: seen.append(1))
    monkeypatch.setattr(module, "log_terms", lambda stage, terms, batch: logged.update(terms.values))
    monkeypatch.setattr(module, "log", lambda *_: None)
    monkeypatch.setattr(module, "logs_this_step", lambda: True)
    loss = module.training_step(batch, 0)
    handle.remove()
    features = out.image_features.double(), out.text_features.double(), out.logit_scale.double()
    terms = {**loss_terms(out), "distillation": plain(*features, teachers())}
    factors = {"contrastive": weights[0], "caption": weights[1], "distillation": 0.7}
    assert loss.item() == pytest.approx(sum(factors[name] * term.item() for name, term in terms.items()), abs=1e-5)
    assert seen == [1]
    assert set(logged) == {name for name, factor in factors.items() if factor}


def test_without_teachers_training_stops_and_validation_goes_on() -> None:
    net = create_model("coca_tiny", **ENCODER)
    module = CoCaLit(net, AdamW(lr=0.0), 0, objectives={"teach": Distillation()})
    with pytest.raises(ConfigError, match=r"data\.teachers"):
        module.training_step(own_batch(net, 0), 0)
    module.eval()
    batch = own_batch(net, 0)
    assert set(terms_of(net, module.objectives_of(batch), batch).values) == {"contrastive", "caption"}


def test_batches_carry_what_the_teachers_say() -> None:
    rows: list[Any] = [
        Example(torch.zeros(3, 2, 2, dtype=torch.uint8), [1, 2], "", extras=as_extras([Teacher(i, t, 20.0)]))
        for i, t in zip(unit(0, 4).half(), unit(1, 4).half(), strict=True)
    ]
    batch: Batch = collate(rows, 0).to(torch.device("cpu"))
    (found,) = teachers_of(batch)
    assert torch.equal(found.images, unit(0, 4).half())
    assert torch.equal(found.texts, unit(1, 4).half())
    assert found.logit_scale == 20.0

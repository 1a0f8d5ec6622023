"""The contrastive loss of captions among questions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.distributed import rank, world_size
from coca_lit.lit_module import CoCaLit
from coca_lit.losses import contrastive_loss
from coca_lit.models import CoCaOutput, create_model
from coca_lit.projects.places.objective import ContrastiveOfCaptions
from coca_lit.testing import ENCODER, PAIRS, check_two_ranks_and_micro_batches, own_batch, trained_with
from coca_lit.training.optim import AdamW

ASKED = torch.tensor([1, 1, 1, 3, 1, 2])  # tokens before the answer; 1 for a caption


def with_questions(net: nn.Module, step: int) -> Batch:
    """This rank's part of a batch of captions and questions; the first of two ranks has three of the four captions."""
    share = PAIRS // world_size()
    return own_batch(net, step)._replace(prefix_lengths=ASKED[rank() * share :][:share])


def trained_on_captions(micro_batch_size: int | None, weight: float = 0.7) -> dict[str, Tensor]:
    return trained_with(ContrastiveOfCaptions(weight), with_questions, 0.0, micro_batch_size)


def test_the_contrastive_loss_of_captions_leaves_questions_out() -> None:
    net = create_model("coca_tiny", **ENCODER)
    drawn = torch.Generator().manual_seed(0)
    sides = [F.normalize(torch.randn(PAIRS, 6, generator=drawn), dim=-1).requires_grad_() for _ in range(2)]
    inputs = (*sides, torch.tensor([9.0], requires_grad=True))
    out = CoCaOutput(*inputs)
    found = ContrastiveOfCaptions()(net, with_questions(net, 0), out)["contrastive_of_captions"]
    captions = ASKED == 1
    expected = contrastive_loss(sides[0][captions], sides[1][captions], inputs[2])
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))
    only = with_questions(net, 0)._replace(prefix_lengths=torch.full((PAIRS,), 2))
    nothing = ContrastiveOfCaptions()(net, only, out)["contrastive_of_captions"]
    assert nothing.item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(nothing, inputs))


def test_captions_among_questions_on_two_ranks_and_in_micro_batches(on_ranks) -> None:
    check_two_ranks_and_micro_batches(on_ranks, trained_on_captions)


def test_it_trains_what_the_contrastive_loss_trains() -> None:
    net = create_model("coca_tiny", **ENCODER)
    CoCaLit(net, AdamW(lr=0.0), 0, 0.0, 2.0, objectives={"captions": ContrastiveOfCaptions()})
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == []


def test_a_network_with_a_bias_has_no_softmax() -> None:
    with pytest.raises(ValueError, match="softmax"):
        ContrastiveOfCaptions().build(create_model("coca_tiny", contrastive="siglip"))

"""Both losses against naive loops, and against themselves on several ranks."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.distributed import rank, world_size
from coca_lit.losses import caption_loss, contrastive_loss

CAPTION_LENGTHS = [1, 7, 2, 2, 3, 9, 4, 1, 1, 5, 12, 6]  # predicted tokens of 12 pairs: no two ranks get equally many


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def nll(scores: list[float], target: int) -> float:
    return math.log(sum(math.exp(s) for s in scores)) - scores[target]


def test_contrastive_loss_equals_a_double_loop() -> None:
    torch.manual_seed(0)
    images, texts, scale = unit(5, 8), unit(5, 8), 6.0
    score = [[scale * float(image @ text) for text in texts] for image in images]
    expected = 0.0
    for i in range(5):
        expected += nll(score[i], i) / 10  # the right text among all texts
        expected += nll([score[j][i] for j in range(5)], i) / 10  # the right image among all images
    assert contrastive_loss(images, texts, torch.tensor([scale])).item() == pytest.approx(expected, abs=1e-6)


def test_contrastive_loss_is_symmetric() -> None:
    torch.manual_seed(0)
    images, texts, scale = unit(4, 8), unit(4, 8), torch.tensor([3.0])
    torch.testing.assert_close(contrastive_loss(images, texts, scale), contrastive_loss(texts, images, scale))


def test_contrastive_loss_at_its_ends() -> None:
    scale = torch.tensor([100.0])
    assert contrastive_loss(torch.eye(4), torch.eye(4), scale).item() < 1e-6
    same = unit(1, 4).expand(4, 4)
    assert contrastive_loss(same, same, scale).item() == pytest.approx(math.log(4))


def test_contrastive_loss_of_bfloat16_features_is_float32() -> None:
    loss = contrastive_loss(unit(3, 4).bfloat16(), unit(3, 4).bfloat16(), torch.ones(1).bfloat16())
    assert loss.dtype == torch.float32


def test_caption_loss_equals_a_loop_and_ignores_minus_100() -> None:
    torch.manual_seed(0)
    hidden, vocabulary = torch.randn(6, 8), torch.randn(11, 8)
    labels = torch.tensor([3, -100, 0, 10, -100, 3])
    terms = [nll([float(h @ v) for v in vocabulary], int(y)) for h, y in zip(hidden, labels, strict=True) if y >= 0]
    assert len(terms) == 4
    assert caption_loss(hidden, vocabulary, labels).item() == pytest.approx(sum(terms) / 4, abs=1e-6)


def test_caption_loss_of_equal_logits_is_the_log_of_the_vocabulary() -> None:
    assert caption_loss(torch.randn(3, 4), torch.zeros(50, 4), torch.tensor([0, 7, 49])).item() == pytest.approx(
        math.log(50)
    )


@pytest.mark.parametrize("labels", [[], [-100, -100]], ids=["no-states", "all-ignored"])
def test_caption_loss_without_tokens_is_zero_and_can_be_differentiated(labels: list[int]) -> None:
    hidden, vocabulary = torch.randn(len(labels), 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = caption_loss(hidden, vocabulary, torch.tensor(labels, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(vocabulary.grad, torch.zeros(9, 4))


class Toy(nn.Module):
    """Projections of given inputs: every parameter is shared by all samples, as in the real model."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 5), nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.decoder, self.vocabulary = nn.Linear(6, 7), nn.Linear(7, 13, bias=False)

    def forward(self, images: Tensor, texts: Tensor, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return (
            contrastive_loss(*features, self.scale.exp()),
            caption_loss(self.decoder(states), self.vocabulary.weight, labels),
        )


def toy_step() -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients of this rank's part of 12 pairs, both averaged over ranks as DDP and the logger do."""
    torch.manual_seed(0)
    toy, count = Toy(), len(CAPTION_LENGTHS)
    images, texts = torch.randn(count, 6), torch.randn(count, 6)
    states = torch.randn(sum(CAPTION_LENGTHS), 6).split(CAPTION_LENGTHS)
    labels = torch.randint(0, 13, (sum(CAPTION_LENGTHS),)).split(CAPTION_LENGTHS)

    share = count // world_size()
    own = slice(rank() * share, (rank() + 1) * share)
    losses = torch.stack(toy(images[own], texts[own], torch.cat(states[own]), torch.cat(labels[own])))
    losses.sum().backward()
    results = [losses.detach(), *(p.grad for p in toy.parameters())]
    if world_size() > 1:
        for tensor in results:
            dist.all_reduce(tensor)
            tensor /= world_size()
    return results[0], dict(zip(dict(toy.named_parameters()), results[1:], strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_losses_on_several_ranks_equal_one_process_with_the_global_batch(on_ranks, world: int) -> None:
    losses, gradients = toy_step()
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for rank_losses, rank_gradients in on_ranks(world, toy_step):
        torch.testing.assert_close(rank_losses, losses, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(rank_gradients, gradients, atol=1e-6, rtol=0)

"""Objectives of captions: parallel prediction, prompts that are read and not predicted, captions among questions."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.data.batch import Batch, padded
from coca_lit.distributed import rank, world_size
from coca_lit.extensions import names_in
from coca_lit.lit_module import CoCaLit
from coca_lit.losses import contrastive_loss, loss_terms
from coca_lit.models import CoCa, CoCaOutput, create_model
from coca_lit.models.coca import CAPTION
from coca_lit.training.caption_objectives import ContrastiveOfCaptions, ParallelPrediction, PrefixPrompts
from coca_lit.training.optim import AdamW
from helpers.running import run
from helpers.steps import ENCODER, PAIRS, own_batch, trained_with

CAPTIONS = ["a large red circle", "a small blue square below a green ring", "the pink star is left of the cyan cross"]


@pytest.fixture(scope="module", params=[None, *names_in("text_towers")], ids=str)
def net(request: pytest.FixtureRequest) -> CoCa:
    torch.manual_seed(0)
    return create_model("coca_tiny", text_tower=request.param, pooler="openclip_parallel").eval()


def make_batch(net: CoCa, captions: list[str]) -> Batch:
    tokens, lengths = padded(net.tokenizer.encode_batch(captions), net.tokenizer.pad_id)
    images = torch.randint(0, 256, (len(captions), 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return Batch(images.to(torch.uint8), tokens, lengths, [str(i) for i in range(len(captions))])


@torch.no_grad()
def test_masked_captions_are_predicted_from_the_image_alone(net: CoCa) -> None:
    batch, objective = make_batch(net, CAPTIONS), ParallelPrediction(share=1.0)
    objective.build(net)
    total, count = 0.0, 0
    for i, length in enumerate(batch.lengths.tolist()):
        empty = torch.full((1, length), net.tokenizer.sot_id)
        logits = net(batch.images[i : i + 1], empty, torch.tensor([length]), needs=CAPTION).logits  # (T - 1, V)
        total += F.cross_entropy(logits, batch.tokens[i, 1:length], reduction="sum").item()
        count += length - 1
    objective.train()
    assert objective(net, batch)["parallel"].item() == pytest.approx(total / count, rel=1e-5)
    plain = loss_terms(net(batch.images, batch.tokens, batch.lengths))["caption"].item()
    assert objective.eval()(net, batch)["parallel"].item() == pytest.approx(plain, rel=1e-5)
    assert plain != pytest.approx(total / count, rel=1e-3)


@torch.no_grad()
def test_a_share_of_the_captions_is_masked_and_questions_are_not(net: CoCa) -> None:
    batch, objective = make_batch(net, CAPTIONS), ParallelPrediction(share=0.75)
    asked = batch._replace(prefix_lengths=torch.tensor([3, 3, 3]))
    torch.manual_seed(0)
    read = torch.stack([objective.masked(asked, net.tokenizer.sot_id) for _ in range(200)])
    assert (read[:, :, :3] == batch.tokens[:, :3]).all()
    masked = (read[:, :, 3:] == net.tokenizer.sot_id).all(-1)
    assert masked.float().mean().item() == pytest.approx(0.75, abs=0.05)
    assert (read[~masked] == batch.tokens.expand_as(read)[~masked]).all()


def test_prompts_of_unknown_words_are_refused(net: CoCa) -> None:
    with pytest.raises(ValueError, match="tell the prompts apart: short, caption, detailed, description"):
        PrefixPrompts(["short caption", "detailed description"]).build(net)


def test_prompts_by_hand(net: CoCa) -> None:
    """Start, prompt, caption, end; what is too long is cut and ends with the end."""
    objective = PrefixPrompts(["we see", "how many"])
    objective.build(net)
    encode, words = net.tokenizer.encode, "a large red circle"
    long = " ".join(["red"] * 30)
    batch = objective.with_prompts(net, make_batch(net, [words, long]), torch.tensor([0, 1]))
    first = encode(f"we see {words}")
    assert batch.tokens[0, : len(first)].tolist() == first
    assert (batch.tokens[0, len(first) :] == net.tokenizer.pad_id).all()
    assert batch.tokens[1].tolist() == encode(f"how many {long}")
    assert batch.lengths.tolist() == [len(first), 24]
    assert batch.prefix_lengths.tolist() == [3, 3]
    asked = make_batch(net, [words, long])._replace(prefix_lengths=torch.tensor([3, 4]))
    assert objective.with_prompts(net, asked, torch.tensor([0, 1])).prefix_lengths.tolist() == [5, 6]
    with torch.no_grad():
        found = objective.eval()(net, make_batch(net, [words, words]))["prefixed"]
    one = objective.with_prompts(net, make_batch(net, [words, words]), torch.tensor([0, 0]))
    expected = loss_terms(net(one.images, one.tokens, one.lengths, prefix_lengths=one.prefix_lengths))["caption"]
    torch.testing.assert_close(found, expected.detach())


def test_parallel_prediction_alone_trains_what_captioning_trains() -> None:
    """CapPa: no contrastive loss, whose parts are frozen; nothing that is trained lacks a gradient."""
    net = create_model("coca_tiny", pooler="parallel")
    objectives = {"cappa": ParallelPrediction()}
    module = CoCaLit(net, AdamW(lr=1e-3), contrastive_weight=0, caption_weight=0, objectives=objectives)
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    assert any(name.startswith("decoder.vocabulary") for name in names)
    assert not any(name.startswith(("image_projection", "pooling.contrastive", "text.cls_embedding")) for name in names)
    module.training_step(make_batch(net, CAPTIONS), 0).backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == names


@pytest.mark.slow
def test_a_run_with_both(tmp_path: Path) -> None:
    run(
        tmp_path,
        *("trainer=smoke", "evals=[]", "model.caption_weight=0"),
        "+model.objectives.cappa._target_=coca_lit.training.caption_objectives.ParallelPrediction",
        "+model.objectives.prompts._target_=coca_lit.training.caption_objectives.PrefixPrompts",
        "+model.objectives.prompts.prompts=[we see]",
    )
    log = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "train/parallel_loss" in log
    assert "train/prefixed_loss" in log


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
    expected = trained_on_captions(None)
    unlike = trained_on_captions(None, weight=0.1)
    assert any((expected[name] - other).abs().max() > 1e-4 for name, other in unlike.items())
    for found in [
        trained_on_captions(2),
        *on_ranks(2, trained_on_captions, None),
        *on_ranks(2, trained_on_captions, 1),
    ]:
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_it_trains_what_the_contrastive_loss_trains() -> None:
    net = create_model("coca_tiny", **ENCODER)
    CoCaLit(net, AdamW(lr=0.0), 0, 0.0, 2.0, objectives={"captions": ContrastiveOfCaptions()})
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == []


def test_a_network_with_a_bias_has_no_softmax() -> None:
    with pytest.raises(ValueError, match="softmax"):
        ContrastiveOfCaptions().build(create_model("coca_tiny", contrastive="siglip"))

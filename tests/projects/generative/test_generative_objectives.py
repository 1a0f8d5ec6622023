"""Objectives of captions: parallel prediction, and prompts that are read and not predicted."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from coca_lit.data.batch import Batch, padded
from coca_lit.extensions import declared
from coca_lit.lit_module import CoCaLit
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, create_model
from coca_lit.models.coca import CAPTION
from coca_lit.projects.generative.objectives import ParallelPrediction, PrefixPrompts
from coca_lit.training.objectives import Objective
from coca_lit.training.optim import AdamW
from helpers.objectives import check_means
from helpers.running import run

CAPTIONS = ["a large red circle", "a small blue square below a green ring", "the pink star is left of the cyan cross"]


@pytest.fixture(scope="module", params=[None, *declared("text_towers")], ids=str)
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
        "+model.objectives.cappa._target_=coca_lit.projects.generative.objectives.ParallelPrediction",
        "+model.objectives.prompts._target_=coca_lit.projects.generative.objectives.PrefixPrompts",
        "+model.objectives.prompts.prompts=[we see]",
    )
    log = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "train/parallel_loss" in log
    assert "train/prefixed_loss" in log


@pytest.mark.parametrize(
    ("objective", "term"), [(ParallelPrediction(share=1.0), "parallel"), (PrefixPrompts("we see"), "prefixed")]
)
def test_two_batches_do_not_have_the_mean_of_both(objective: Objective, term: str) -> None:
    check_means(objective, term, over_tokens=True)

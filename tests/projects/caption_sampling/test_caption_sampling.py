"""All captions of an image in one step, against a pass for each of them; merged captions, by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.losses import loss_terms
from coca_lit.models import create_model
from coca_lit.projects.caption_sampling.objective import FurtherCaptions
from coca_lit.projects.caption_sampling.records import merged, sentences
from coca_lit.testing import ENCODER, check_two_ranks_and_micro_batches, trained_with, with_further_captions
from coca_lit.training.objectives import forward_pass
from helpers.running import run

FURTHER = 2


@torch.no_grad()
def test_losses_are_those_of_a_batch_for_each_caption() -> None:
    torch.manual_seed(0)
    net = create_model("coca_tiny", **ENCODER).eval()
    objective = FurtherCaptions()
    objective.build(net)
    batch = with_further_captions(net, 0)
    found = objective(net, batch, forward_pass(net, batch, objective.needs))
    contrastive, caption, tokens = 0.0, 0.0, 0
    for i in range(FURTHER):
        ids, lengths = batch.extras["further_tokens"][:, i], batch.extras["further_lengths"][:, i]
        terms = loss_terms(net(batch.images, ids, lengths))
        contrastive += terms["contrastive"].item() / FURTHER
        count = int((lengths - 1).sum())
        caption += terms["caption"].item() * count
        tokens += count
    assert found["further_contrastive"].item() == pytest.approx(contrastive, rel=1e-5)
    assert found["further_caption"].item() == pytest.approx(caption / tokens, rel=1e-5)


def trained(micro_batch_size: int | None, weight: float = 0.7) -> dict[str, Tensor]:
    return trained_with(FurtherCaptions(weight, 2 * weight), with_further_captions, 1.0, micro_batch_size)


def test_two_ranks_and_micro_batches(on_ranks) -> None:
    check_two_ranks_and_micro_batches(on_ranks, trained)


@pytest.mark.parametrize(("weights", "terms"), [((0, 2), ["further_caption"]), ((1, 0), ["further_contrastive"])])
def test_a_weight_of_zero_leaves_a_loss_out(weights: tuple, terms: list) -> None:
    net = create_model("coca_tiny", **ENCODER)
    objective = FurtherCaptions(*weights)
    objective.build(net)
    batch = with_further_captions(net, 0)
    assert [*objective(net, batch, forward_pass(net, batch, objective.needs))] == terms


def read(root: str, split: str, name: str) -> list[Record]:
    return [Record(f"{root} {split} {name}", "x.png", ["one.", "two", "is it three? yes."])]


def test_merged_captions_by_hand() -> None:
    pairs = merged("there", "train", records=read, name="set")
    assert pairs[0].id == "there train set"
    first, second, third = "one.", "two.", "is it three? yes."
    expected = {f"{a} {b}" for a in (first, second, third) for b in (first, second, third) if a != b}
    assert set(pairs[0].captions) == expected
    assert merged("there", "val", records=read, name="set") == read("there", "val", "set")
    assert len(merged("there", "train", records=read, count=9, name="set")[0].captions) == 6
    split = sentences("there", "train", records=read, name="set")
    assert split[0].captions == ("one.", "two", "is it three?", "yes.")
    assert sentences("there", "val", records=read, name="set") == read("there", "val", "set")


@pytest.mark.slow
def test_a_run(tmp_path: Path) -> None:
    run(
        tmp_path,
        *("trainer=smoke", "evals=[]", "data.captions=3"),
        "+model.objectives.further._target_=coca_lit.projects.caption_sampling.objective.FurtherCaptions",
    )
    log = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "train/further_contrastive_loss" in log
    assert "train/further_caption_loss" in log

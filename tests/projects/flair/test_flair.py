"""Text-conditioned pooling and its losses, against loops over images, texts, heads and tokens."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coca_lit import load_model, save_model
from coca_lit.data.scenes.render import scene_records
from coca_lit.evals.base import Settings
from coca_lit.evals.retrieval import RetrievalScores
from coca_lit.models import CoCa, create_model
from coca_lit.projects.flair.comparison import PooledSimilarity
from coca_lit.projects.flair.objective import TextConditioned
from coca_lit.projects.flair.pooling import TextConditionedPooling
from coca_lit.testing import ENCODER, check_two_ranks_and_micro_batches, trained_with, with_further_captions
from coca_lit.training.objectives import forward_pass
from helpers.running import run

FURTHER = 2


def made(heads: int = 8) -> tuple[CoCa, TextConditioned]:
    torch.manual_seed(0)
    net = create_model("coca_tiny", contrastive="siglip", **ENCODER).eval()
    objective = TextConditioned(heads)
    objective.build(net)
    for p in objective.pooling.parameters():
        nn.init.normal_(p, std=0.3)
    return net, objective


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias


def cosine_by_hand(pooling: TextConditionedPooling, image_tokens: Tensor, text: Tensor) -> float:
    """(Q, T) and (E,): one token and one head after the other, with a last key and value of zeros."""
    query = pooling.query.weight @ normed(text, pooling.norm_text) + pooling.query.bias
    tokens = [normed(token, pooling.norm_image) for token in image_tokens]
    keys = [pooling.key.weight @ token + pooling.key.bias for token in tokens] + [torch.zeros_like(query)]
    values = [pooling.value.weight @ token + pooling.value.bias for token in tokens] + [torch.zeros_like(query)]
    size = len(query) // pooling.heads
    pooled = torch.zeros_like(query)
    for head in range(pooling.heads):
        part = slice(head * size, (head + 1) * size)
        weights = [math.exp(float(query[part] @ key[part]) / math.sqrt(size)) for key in keys]
        for weight, value in zip(weights, values, strict=True):
            pooled[part] += weight / sum(weights) * value[part]
    vector = pooling.out.weight @ pooled + pooling.out.bias
    return float(vector @ text / vector.norm() / text.norm())


@torch.no_grad()
def test_losses_and_scores_by_hand() -> None:
    net, objective = made()
    batch = with_further_captions(net, 0)
    out = forward_pass(net, batch, objective.needs)
    scales = {"plain": (out.logit_scale, out.logit_bias), "text_conditioned": (objective.scale.exp(), objective.bias)}
    totals = dict.fromkeys(scales, 0.0)
    count = len(batch.tokens)
    for i in range(count):
        texts = [(out.text_features[j], i == j) for j in range(count)]
        texts += [(text, True) for text in out.further_text_features[i]]
        for text, is_own in texts:
            cosines = {
                "plain": float(out.image_features[i] @ text),
                "text_conditioned": cosine_by_hand(objective.pooling, out.image_tokens[i], text),
            }
            for term, (scale, bias) in scales.items():
                logit = float(scale) * cosines[term] + float(bias)
                totals[term] -= math.log(1 / (1 + math.exp(-logit if is_own else logit)))
    found = objective(net, batch, out)
    for term, total in totals.items():
        assert found[term].item() == pytest.approx(total / (count + FURTHER), rel=1e-4), term
    net.objectives = {"flair": objective}
    comparison = PooledSimilarity()
    comparison.check(net)
    images, texts = comparison.encode_images(net, batch.images), comparison.encode_texts(net, batch.tokens)
    by_hand = [[cosine_by_hand(objective.pooling, image, text) for text in texts] for image in images]
    expected = net.logit_scale.exp() * torch.tensor(by_hand)
    torch.testing.assert_close(comparison.compare(net, images, texts), expected, atol=1e-4, rtol=1e-4)


def trained(micro_batch_size: int | None, weight: float = 0.7) -> dict[str, Tensor]:
    objective = TextConditioned(8, weight, weight)
    return trained_with(objective, with_further_captions, 0.0, micro_batch_size, contrastive="siglip")


def test_two_ranks_and_micro_batches(on_ranks) -> None:
    check_two_ranks_and_micro_batches(on_ranks, trained)


def test_it_is_kept_and_scored(tmp_path: Path) -> None:
    net, objective = made(heads=4)
    net.objectives = {"flair": objective}
    save_model(net, tmp_path / "model.safetensors")
    kept = load_model(tmp_path / "model.safetensors")
    assert kept.objectives["flair"].heads == 4
    torch.testing.assert_close(dict(kept.objectives["flair"].state_dict()), dict(objective.state_dict()))
    records = scene_records("val", size=32)[:4]
    evaluation = RetrievalScores("scenes", records, rerank=4, rerank_weight=1, comparison=PooledSimilarity())
    assert "reranked_t2i_recall@1" in evaluation.scores(kept, records, Settings(tmp_path))
    kept.objectives = {}
    evaluation.not_run = {}
    evaluation.scores(kept, records, Settings(tmp_path))
    assert "TextConditioned" in evaluation.not_run["scenes reranked recall"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "contrastive=siglip"), ({"contrastive": "siglip", "decoder_layers": 0}, "decoder")],
)
def test_networks_that_lack_something(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConditioned().build(create_model("coca_tiny", **arguments))


@pytest.mark.slow
def test_a_run(tmp_path: Path) -> None:
    scores = run(tmp_path, "experiment=scenes_flair", "trainer=smoke", "evals=[scenes_flair]", "scoring.images=8")
    assert "scenes_flair/reranked_t2i_recall@1" in scores

"""CoCa2 in training, evaluation, generation and export, as every other member of the family."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coca_lit.models import create_model
from coca_lit.projects.coca2.presets import PRESETS
from coca_lit.weights.open_clip import to_open_clip
from helpers.family import (
    check_attention_of_the_decoder,
    check_each_text_passes_the_tower_once,
    check_graphs,
    check_planned_flops,
    check_preset,
)
from helpers.scored_runs import check_experiment_on_scenes

MODERN = {"text_tower": "modern", "pooler": "openclip_cascade"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    check_preset(name)


def test_sizes_of_coca2() -> None:
    with torch.device("meta"):
        model = create_model("coca2_ViT-B-32")
    assert len(to_open_clip(model)) == 637
    sizes = {"image": 0, "text": 0, "decoder": 0}
    for name, parameter in model.named_parameters():
        part = "image" if name.startswith(("image_", "pooling")) else name.partition(".")[0]
        if part in sizes:
            sizes[part] += parameter.numel()
    assert sizes == {"image": 89_955_584, "text": 63_428_608, "decoder": 100_967_424}
    with torch.device("meta"):
        model = create_model("coca2-moderntext_ViT-B-32")
    assert sum(p.numel() for p in model.parameters()) == 263_526_657
    assert len(to_open_clip(model)) == 405


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoder_args": {"cross_attention_every": 0}}, "cross_attention_every.*0"),
        ({"text_tower_args": {"qknorm": True}}, "text_tower_args.*'qknorm'.*'qk_norm'"),
        ({"decoder_args": {"cross_attention_evry": 3}}, "'cross_attention_evry'.*cross_attention_every"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("coca_tiny", text_tower="modern", text_heads=4, **arguments)


def test_attention_of_the_decoder() -> None:
    check_attention_of_the_decoder(text_tower="modern", decoder_layers=3, decoder_args={"cross_attention_every": 2})


def test_each_text_passes_the_tower_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_each_text_passes_the_tower_once(monkeypatch, **MODERN)


@pytest.mark.slow
def test_planned_flops() -> None:
    check_planned_flops(**MODERN, decoder_args={"qk_norm": True})


@pytest.mark.slow
def test_graphs(tmp_path: Path) -> None:
    tower_args = {"pool": "mean", "qk_norm": True}
    sizes = {"text_layers": 1, "decoder_layers": 1, "pooler_queries": 5}
    check_graphs(create_model("coca_tiny", **MODERN, text_tower_args=tower_args, **sizes).eval(), tmp_path)


@pytest.mark.slow
def test_the_experiment_runs_on_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("+model.net.pooler=openclip_cascade", "+model.net.text_tower=modern")
    check_experiment_on_scenes(monkeypatch, tmp_path, "pretrain_coca2_b32", *words)

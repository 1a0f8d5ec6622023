"""MaMMUT in training, evaluation, generation, export and on the Hub, as every other member of the family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from small_mammut import released_files

from coca_lit.models import create_model
from coca_lit.models.image import CLIP_NORMALISATION
from coca_lit.weights.load import load_dual_encoder, load_model
from helpers.family import (
    check_attention_of_the_decoder,
    check_each_text_passes_the_tower_once,
    check_graphs,
    check_planned_flops,
    check_preset,
    check_sharded_training,
    check_start_with_another_context,
)
from helpers.hub_server import Hub, Repository, answers_at
from helpers.scored_runs import check_experiment_on_scenes
from helpers.slow import slow
from helpers.tokenizer_files import SPECIAL, trained_file

MAMMUT = {"pooler": "mean", "text_tower": "two_pass"}
THREE_LAYERS = {"text_layers": 3, "decoder_layers": 3}
WITHOUT_MLP = {"pooler": "mean_all", "text_tower": "two_pass_with_pads", "text_tower_args": {"attention_only_every": 2}}
WORDS = ("+model.net.pooler=mean", "+model.net.text_tower=two_pass")
OPENMAMMUT = "laion/openMaMMUT-ViT-L-14-DataComp-1.4B-s12.8B-b180K"


@pytest.mark.parametrize("name", ["mammut2_vit_b32", "mammut_vit_b32", *slow("mammut2_vit_l14", "mammut_vit_h14")])
def test_presets(name: str) -> None:
    check_preset(name)


def test_attention_of_the_decoder() -> None:
    check_attention_of_the_decoder(**MAMMUT, **THREE_LAYERS)


def test_each_text_passes_the_tower_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_each_text_passes_the_tower_once(monkeypatch, **MAMMUT, text_layers=2, decoder_layers=2)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [MAMMUT, WITHOUT_MLP], ids=["MaMMUT2", "without MLP"])
def test_planned_flops(arguments: dict[str, Any]) -> None:
    check_planned_flops(**arguments)


@pytest.mark.slow
def test_graphs_beside_a_tokenizer_of_a_file(tmp_path: Path) -> None:
    tokenizer = {"file": str(trained_file("Metaspace", tmp_path)), **SPECIAL}
    model = create_model("coca_tiny", **MAMMUT, text_layers=1, decoder_layers=1, tokenizer=tokenizer)
    check_graphs(model.eval(), tmp_path)


@pytest.mark.slow
def test_graphs_without_mlp(tmp_path: Path) -> None:
    model = create_model("coca_tiny", **WITHOUT_MLP, **THREE_LAYERS, decoder_args={"cross_attention_every": 2})
    check_graphs(model.eval(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("length", [40, 12])
def test_a_captioner_starts_with_another_context(length: int) -> None:
    vit = {"patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
    arguments = {"image_encoder": "vit_base_patch32_clip_224", "image_encoder_args": vit, "tokenizer": "clip", **MAMMUT}
    source = create_model("coca_tiny", **arguments, context_length=24).eval()
    check_start_with_another_context(source, create_model("coca_tiny", **arguments, context_length=length).eval())


@pytest.mark.slow
def test_sharded_training(on_ranks, tmp_path: Path) -> None:
    """Blocks run twice in a step and get one gradient."""
    check_sharded_training(on_ranks, tmp_path, *WORDS)


@pytest.mark.slow
def test_the_experiment_runs_on_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_experiment_on_scenes(monkeypatch, tmp_path, "pretrain_mammut_b32", *WORDS)


@pytest.mark.slow
def test_openmammut_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout of the code that trained it; random weights of a small one."""
    model, state, config = released_files()
    preprocess = {**CLIP_NORMALISATION, "interpolation": "bicubic", "resize_mode": "shortest"}
    files = {"open_clip_config.json": json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}).encode()}
    with Hub() as hub:
        answers_at(monkeypatch, hub.url, tmp_path)
        hub.repositories[OPENMAMMUT] = Repository({"open_clip_model.safetensors": save(state), **files})
        found = load_model(f"hf-hub:{OPENMAMMUT}")
    torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert found.preprocessing == model.preprocessing
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert torch.equal(found.generate(image), model.generate(image))
    assert torch.equal(found.encode_text(found.tokenizer(["a dog"])), model.encode_text(model.tokenizer(["a dog"])))


@pytest.mark.parametrize(
    ("tensor", "called"),
    [
        ("text.blocks.0.norm1.weight", "a MaMMUT with OpenCLIP 4's modern text tower"),
        ("visual.trunk.blocks.0.norm1.weight", "a MaMMUT whose image tower is one of timm's"),
    ],
)
def test_relatives_that_cannot_be_read_are_called_by_their_names(tmp_path: Path, tensor: str, called: str) -> None:
    names = ("logit_scale", "map_viz2txt_kv", tensor)
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "model.pt")
    for load in (load_model, load_dual_encoder):
        with pytest.raises(ValueError, match=f"this is {called}"):
            load(tmp_path / "model.pt")

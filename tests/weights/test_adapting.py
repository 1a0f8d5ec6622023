"""Finetuning that keeps what was learned, as commands: LoRA, weights between two checkpoints, CLIP's towers."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from coca_lit.cli import evaluate
from coca_lit.cli.command import compose as compose_config
from coca_lit.cli.module import build_module
from coca_lit.errors import ConfigError
from coca_lit.models import create_model
from coca_lit.tools.export.command import run as export
from coca_lit.tools.plan.command import build_without_weights
from coca_lit.tools.plan.estimate import measure
from coca_lit.tools.plan.trace import cost
from coca_lit.weights.load import load_model, save_model
from coca_lit.weights.lora import LowRank
from helpers.running import compose, run

SHORT = (
    *("experiment=scenes", "trainer=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "evals=[]"),
    *("trainer.limit_val_batches=0", "data.train_count=24", "data.batch_size=8", "model.warmup_steps=2"),
    "model.net.dropout=0.2",
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("start") / "before.safetensors"
    save_model(create_model("coca_tiny"), path)
    return path


@pytest.fixture(scope="module")
def adapted(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a LoRA finetuning with averaged weights, with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    every = ("callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep_last=9")
    run(folder, *SHORT, "lora.rank=2", "lora.parts=[image_encoder,text]", "ema=0.5", f"init_from={start}", *every)
    return folder


def test_a_lora_run_changes_what_it_may(adapted: Path, start: Path) -> None:
    before, after = load_model(start).state_dict(), load_model(adapted / "checkpoints" / "last.ckpt").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = {name for name in changed if name.startswith(("image_encoder.", "text."))}
    assert {"text.blocks.0.attention.qkv.weight", "image_encoder.trunk.conv1.0.weight"} <= inside
    assert all(before[name].ndim > 1 for name in inside)  # no bias, norm or running statistic
    assert "text.token_embedding.weight" not in changed
    assert {"decoder.norm.weight", "decoder.vocabulary.weight", "logit_scale"} <= changed


@pytest.mark.slow
def test_a_lora_run_goes_on_exactly(adapted: Path, start: Path, tmp_path: Path) -> None:
    same = ("lora.rank=2", "lora.parts=[image_encoder,text]", "ema=0.5", f"init_from={start}")
    run(tmp_path, *SHORT, *same, f"ckpt_path={adapted}/checkpoints/step_2.ckpt")
    one, other = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (adapted, tmp_path))
    for key in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(one[key], other[key], atol=0, rtol=0)
    assert any(".parametrizations.weight.0.a" in name for name in one["state_dict"])


def test_wrong_lora_is_one_sentence() -> None:
    for override, said in (
        ("+lora.rnk=2", "'lora.rank'"),
        ("lora.rank=two", r"lora\.rank.*two"),
        ("lora.parts=[txt]", "parts.*txt"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_module(compose(*SHORT, "lora.rank=2", override) if "rank=" not in override else compose(override))


@pytest.mark.parametrize("build", [build_module, build_without_weights])
def test_batch_norms_that_lora_freezes_allow_micro_batches(build: Any) -> None:
    small = (*SHORT, "lora.rank=2", "trainer.micro_batch_size=2")
    module = build(compose(*small))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) and m.training for m in module.train().modules())
    with pytest.raises(ConfigError, match=r"^model: micro_batch_size does not work with the batch norms of resnet10t"):
        build(compose(*small, "lora.parts=[text]"))


@pytest.mark.slow
def test_the_plan_counts_what_trains() -> None:
    module = build_without_weights(compose(*SHORT, "lora.rank=2"))
    trained = sum(p.numel() for p in module.net.parameters() if p.requires_grad)
    updates = sum(p.numel() for m in module.net.modules() if isinstance(m, LowRank) for p in m.parameters())
    assert trained == updates + 1  # the temperature is in none of the parts
    assert measure(module.net).trained == 4 * trained
    assert cost(module.net, module.loss_weights, caption_tokens=12, autocast=None).total > 0


def evaluation(folder: Path, *overrides: str) -> dict[str, float]:
    folder.mkdir()
    settings = (f"output_dir={folder}", "name=test", "evals=[scenes_retrieval]", "scoring.images=16")
    return evaluate.run(compose_config("evaluate", [*settings, *overrides]))


@pytest.mark.slow
def test_weights_between_two_checkpoints_are_scored_and_exported(adapted: Path, start: Path, tmp_path: Path) -> None:
    last = adapted / "checkpoints" / "last.ckpt"
    both = (f"checkpoint={last}", f"interpolate_with={start}")
    assert evaluation(tmp_path / "0", *both, "weight=0") == evaluation(tmp_path / "before", f"checkpoint={start}")
    with pytest.raises(ConfigError, match=r"interpolate_with: weight must be a number .* at most 1, got 2"):
        evaluation(tmp_path / "2", *both, "weight=2")
    mixed = [*both, "weight=0.25", "format=safetensors", f"output={tmp_path / 'mixed'}"]
    export(compose_config("export", mixed))
    mixed_model = load_model(tmp_path / "mixed" / "model.safetensors").state_dict()
    before, after = load_model(start).state_dict(), load_model(last).state_dict()
    name = "decoder.vocabulary.weight"
    torch.testing.assert_close(mixed_model[name], 0.75 * before[name] + 0.25 * after[name])


def test_locked_image_tower_of_a_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LiT (Zhai et al. 2022): a CLIP's image tower, frozen, and everything else trains."""
    vision: dict[str, Any] = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    text: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(32, vision_cfg=vision, text_cfg=text)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    sizes = {"embed_dim": 32, "pooler_heads": 1, "context_length": 76, "text_width": 64, "text_heads": 1}
    sizes |= {"text_layers": 1, "decoder_layers": 1}
    net = [f"+model.net.{key}={value}" for key, value in sizes.items()]
    encoder = "+model.net.image_encoder_args={patch_size: 16, embed_dim: 64, depth: 1, num_heads: 1}"
    kinds = ("+model.net.image_encoder=vit_base_patch32_clip_224", "+model.net.tokenizer=clip", encoder)
    locked = ("model.freeze=[image_encoder]", f"init_from={tmp_path / 'clip.pt'}")
    run(tmp_path / "run", *SHORT, "trainer.max_epochs=1", *net, *kinds, *locked)
    after = load_model(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert torch.equal(after.image_encoder.trunk.pos_embed[0], clip.visual.positional_embedding)
    assert not torch.equal(after.text.token_embedding.weight, clip.token_embedding.weight)
    assert "which has no captioner; random: logit_scale, pooling, " in capsys.readouterr().out

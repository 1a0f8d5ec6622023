"""Runs that start from weights compute what these weights were trained with; two models are mixed only if they compute
alike.
"""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import save_file
from torch import Tensor

from coca_lit.cli.command import compose as compose_config
from coca_lit.cli.module import build_module
from coca_lit.errors import ConfigError
from coca_lit.tools.export.command import run as export
from coca_lit.weights.load import load_model, save_model
from helpers.running import compose, run

TEXTS = ["a dog", "two cats sit on a very long wooden bench!", "word " * 30]
WEIGHTS = "open_clip_model.safetensors"
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1}
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {
        **{"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "output_tokens": True},
        **{"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2},
    },
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT,
    "custom_text": True,
}
# What the tensors must agree on; what they do not show is not among it.
SIZES = ("embed_dim=32", "pooler_queries=5", "context_length=20", "text_width=32", "text_layers=1", "decoder_layers=1")
NET = ("image_size=32", *(f"+model.net.{size}" for size in SIZES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OpenCLIP CoCa with numbers of heads, mean and deviation of its own."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    torch.manual_seed(0)
    means = {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.3, 0.2, 0.1)}
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", **means)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.state_dict(), folder / WEIGHTS)
    save_config_for_hf(model, folder / "open_clip_config.json", MODEL)
    return folder


@torch.no_grad()
def features(folder: Path) -> tuple[Tensor, Tensor]:
    """What open_clip computes of noise and three texts with the weights in a folder, loaded strictly."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", weights_only=True)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model.eval().encode_image(images), model.encode_text(tokens)


@pytest.mark.slow
def test_openclip_finetuning_openclip(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report's route, with frozen towers: the decoder learns, and retrieval is what it was."""
    start = f"init_from={folder / WEIGHTS}"
    keep = ("experiment=finetune_mscoco_keep", "data=scenes", "trainer=smoke", "evals=[]", "data.train_count=16")
    run(tmp_path / "run", *keep, *NET, start, "data.batch_size=8", "model.optimizer.lr=0.01", "model.warmup_steps=0")
    assert "cls_mask=legacy" in capsys.readouterr().out
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    export(compose_config("export", [f"checkpoint={last}", "format=open_clip", f"output={tmp_path / 'out'}"]))

    images, texts = features(folder)
    again_images, again_texts = features(tmp_path / "out")
    torch.testing.assert_close(again_images, images, atol=1e-6, rtol=0)
    torch.testing.assert_close(again_texts, texts, atol=1e-6, rtol=0)
    ours = load_model(last)
    with torch.no_grad():
        noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(ours.encode_image(noise), images, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.encode_text(ours.tokenizer(TEXTS)), texts, atol=1e-6, rtol=0)
    before = load_model(folder / WEIGHTS)
    assert (ours.decoder.vocabulary.weight - before.decoder.vocabulary.weight).abs().max() > 0.001  # it did learn
    given = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
    exported = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert {key: given[key] for key in exported} == exported


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("model.net.cls_mask=correct", r"cls_mask is 'correct'.* 'legacy'"),
        ("+model.net.text_heads=8", r"text_heads is 8\b.* 4\b"),
        ("+model.net.image_encoder_args={num_heads: 1}", r"image_encoder_args\.num_heads is 1\b.* 3\b"),
        ("+model.net.resize_mode=squash", r"resize_mode is 'squash'.* 'shortest'"),
        ("+model.net.image_encoder_args={act_layer: quick_gelu}", r"init_from: .*\.act is 'QuickGELU.* 'GELU"),
    ],
)
def test_choices_that_contradict_the_weights(folder: Path, choice: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_module(
            compose("experiment=finetune_mscoco", "data=scenes", *NET, f"init_from={folder / WEIGHTS}", choice)
        )


def test_choices_that_do_not(folder: Path) -> None:
    given = (
        "model.net.cls_mask=legacy",
        "+model.net.image_encoder_args={patch_drop_rate: 0.5, attn_drop_rate: 0.1}",
        "model.net.dropout=0.1",
    )
    net = build_module(
        compose("data=scenes", "model.net.name=coca_vit_b32", *NET, f"init_from={folder / WEIGHTS}", *given)
    ).net
    assert net.config.image_encoder_args["patch_drop_rate"] == 0.5
    assert net.config.image_encoder_args["attn_drop_rate"] == 0.1
    expected = load_model(folder / WEIGHTS).state_dict()
    torch.testing.assert_close(net.state_dict(), expected, atol=0, rtol=0)


def test_our_own_weights_keep_their_mask_and_not_their_regularisation(tmp_path: Path, tiny_model: Any) -> None:
    encoder = {"channels": [32, 64, 96, 128], "output_stride": 8, "drop_path_rate": 0.3}
    save_model(tiny_model(cls_mask="legacy", pooler="parallel", image_encoder_args=encoder), tmp_path / "m.safetensors")
    net = build_module(compose("data=scenes", f"init_from={tmp_path / 'm.safetensors'}")).net
    assert (net.config.cls_mask, net.config.pooler) == ("legacy", "parallel")
    assert "drop_path_rate" not in net.config.image_encoder_args
    assert build_module(compose("data=scenes")).net.config.cls_mask == "correct"


@pytest.mark.slow
def test_a_resumed_run_keeps_the_mask_of_its_checkpoint(tmp_path: Path, tiny_model: Any) -> None:
    """Also without `init_from`, and though the config does not name the mask."""
    save_model(tiny_model(cls_mask="legacy"), tmp_path / "m.safetensors")
    short = ("trainer=smoke", "evals=[]", "data.train_count=16", "data.batch_size=8")
    run(tmp_path / "run", *short, f"init_from={tmp_path / 'm.safetensors'}")
    (tmp_path / "m.safetensors").unlink()
    (tmp_path / "run" / "results.json").unlink(missing_ok=True)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    run(tmp_path / "run", *short, "trainer.max_steps=3", f"ckpt_path={last.resolve()}")
    assert load_model(tmp_path / "run" / "checkpoints" / "last.ckpt").config.cls_mask == "legacy"
    with pytest.raises(ConfigError, match=r"ckpt_path: cls_mask.*'correct'.*'legacy'"):
        run(tmp_path / "run", *short, "trainer.max_steps=4", "model.net.cls_mask=correct")

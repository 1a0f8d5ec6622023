"""The folder for Transformers gives our features, tokens and greedy captions where there is no coca_lit, timm or
torchvision.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from coca_lit.cli import export as cli
from coca_lit.cli.command import compose
from coca_lit.data.scenes.render import render
from coca_lit.data.transforms import build_transform
from coca_lit.errors import ConfigError
from coca_lit.models import CoCa, create_model, text_lengths
from coca_lit.weights.load import save_model

pytest.importorskip("transformers")

from coca_lit.export import modeling_coca  # need that package
from coca_lit.export import transformers as writer

pytestmark = pytest.mark.slow  # imports transformers and exports whole models

VIT = {
    "image_encoder": "vit_base_patch32_clip_224",
    "image_encoder_args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "decoder_layers": 1,
    "pooler_queries": 5,
}
MODELS: dict[str, dict[str, Any]] = {
    "open_clip": {"tokenizer": "clip", "cls_mask": "legacy"},
    "words": {"pooler": "cascade", "contrastive": "siglip", "tied_embeddings": True},
    "r50k": {"tokenizer": "r50k"},
    "quick_gelu": {"image_encoder": "vit_base_patch32_clip_quickgelu_224", "pooler": "parallel", "decoder_layers": 0},
}
WITHOUT = (
    "import runpy, sys; sys.modules |= dict.fromkeys(('coca_lit', 'timm', 'torchvision')); del sys.argv[0];"
    " runpy.run_path(sys.argv[0], run_name='__main__')"
)
TEXTS = [
    "a red circle above a small blue star",
    "Two-coloured squares, isn't it?",
    "it’s a “café” — ÉCOLE №5, 日本 12.5%",
    "!#$ <end_of_text> <|endoftext|> </w>",
    "dog " * 90,
    "  blanks \t\n and Case ",
    "",
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, CoCa], dict[str, Any]]:
    """The folder, the models, and what one process without coca_lit made of their exports."""
    folder = tmp_path_factory.mktemp("exports")
    models = {}
    for name, arguments in MODELS.items():
        torch.manual_seed(0)
        models[name] = model = create_model("coca_tiny", **VIT | arguments).eval()
        with torch.no_grad():
            model.logit_scale.fill_(1)
            if model.decoder is not None:  # captions that end at several places
                model.decoder.vocabulary.weight[model.tokenizer.eot_id] *= 3
        save_model(model, folder / f"{name}.safetensors")
        choice = [f"checkpoint={folder}/{name}.safetensors", f"output={folder}/{name}", "format=transformers"]
        cli.run(compose("export", choice))
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    Image.effect_noise((51, 77), 90).convert("RGB").resize((51, 78)).save(folder / "photo.png")
    render(5, 45).save(folder / "scene.png")
    program = str(Path(__file__).with_name("with_transformers.py"))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, program, "found.json", *MODELS],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder, models, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_features_and_tokens(exports: tuple[Path, dict[str, CoCa], dict[str, Any]], name: str) -> None:
    folder, models, all_found = exports
    model, found = models[name], all_found[name]
    tokens = model.tokenizer(TEXTS)
    lengths = text_lengths(tokens, model.tokenizer.pad_id)
    assert found["tokens"] == [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    with torch.no_grad():
        images, texts = model.encode_image(images_of(folder)), model.encode_text(tokens)
        logits = model.logit_scale.exp() * images @ texts.T + (0 if model.logit_bias is None else model.logit_bias)
    for key, expected in (("image_features", images), ("text_features", texts), ("logits", logits)):
        torch.testing.assert_close(torch.tensor(found[key]), expected, atol=1e-5, rtol=0)
    assert np.allclose(found["without_mask"], found["text_features"], atol=1e-6)


def images_of(folder: Path) -> torch.Tensor:
    return torch.stack([build_transform(size=32)(Image.open(folder / f"{name}.png")) for name in ("photo", "scene")])


@pytest.mark.parametrize("name", ["open_clip", "words", "r50k"])
def test_greedy_captions_token_for_token(exports: tuple[Path, dict[str, CoCa], dict[str, Any]], name: str) -> None:
    folder, models, all_found = exports
    model, found = models[name], all_found[name]
    expected = model.generate(images_of(folder))
    lengths = text_lengths(expected, model.tokenizer.pad_id)
    assert rows(found["ids"], lengths) == rows(expected.tolist(), lengths)
    assert found["captions"] == [model.tokenizer.decode(row) for row in expected]
    assert found["without_cache"] == found["ids"]
    assert found["beams"] == found["beams_without_cache"]
    prompted = model.generate(images_of(folder), prompt=model.tokenizer.decode(model.tokenizer(TEXTS[0])[0, :3]))
    lengths = text_lengths(prompted, model.tokenizer.pad_id)
    assert rows(found["prompted"], lengths) == rows(prompted.tolist(), lengths)


def rows(ids: list[list[int]], lengths: torch.Tensor) -> list[list[int]]:
    """Without padding, which is the start token after CLIP's byte pairs."""
    return [row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)]


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(("interpolation", "resample"), [("bicubic", 3), ("bilinear", 2)])
def test_pixels_are_those_of_open_clip(resize_mode: str, interpolation: str, resample: int) -> None:
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    processor = modeling_coca.CoCaImageProcessor(
        {"height": 32, "width": 32}, resample, resize_mode, image_mean=mean, image_std=std
    )
    options = {"resize_mode": resize_mode, "interpolation": interpolation}
    transform = image_transform(32, is_train=False, mean=mean, std=std, **options)
    for size in ((51, 77), (78, 51), (33, 32), (20, 31), (32, 32)):
        image = Image.effect_noise(size, 90).convert("RGB")
        found = processor(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, transform(image)[None], atol=1e-6, rtol=0)


def test_the_card_lists_the_files_and_its_code_runs(exports: tuple[Path, dict[str, CoCa], dict[str, Any]]) -> None:
    folder, _, _ = exports
    card = (folder / "words" / "README.md").read_text()
    names = {path.name for path in (folder / "words").iterdir()} - {"README.md", "__pycache__"}
    assert set(re.findall(r"^\| `(\S+)` \|", card, flags=re.MULTILINE)) == names
    assert "library_name: transformers" in card
    assert "model.generate(**images)" in card
    assert "model.generate" not in (folder / "quick_gelu" / "README.md").read_text()
    compile(re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0], "card", "exec")


def test_what_the_code_lacks_is_refused(tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_model(), tmp_path / "convolutional.safetensors")
    choice = [f"checkpoint={tmp_path}/convolutional.safetensors", f"output={tmp_path}/out", "format=transformers"]
    with pytest.raises(ConfigError, match=r"vit_\*_clip_\*.*the image encoder is resnet10t: export format=safetensors"):
        cli.run(compose("export", choice))
    save_model(tiny_model(**VIT), tmp_path / "convolutional.safetensors")
    monkeypatch.setattr(writer, "TOLERANCE", -1)
    with pytest.raises(
        ConfigError, match="format=transformers cannot build this model: what it would build differs by"
    ):
        cli.run(compose("export", choice))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_gives_other_ids_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "WORD", r"\w")  # letter by letter
    model = create_model("coca_tiny", **VIT, tokenizer=["photo"])
    with pytest.raises(ValueError, match=r"toy\" would be the tokens \[1, 3, 3, 3, .* instead of \[1, 3, 4, 3"):
        writer.write_transformers(model.eval(), tmp_path)

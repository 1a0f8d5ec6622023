"""Graphs in ONNX Runtime compute what the model does, and write its captions token for token without PyTorch."""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnxscript")
import onnxruntime

from coca_lit.cli.command import compose
from coca_lit.data.inputs import source_of
from coca_lit.data.transforms import build_transform
from coca_lit.models import CoCa, create_model
from coca_lit.tools.export import command as cli
from coca_lit.tools.export import onnx
from coca_lit.tools.export.onnx_captioner import Captioner
from coca_lit.weights.load import save_model
from helpers.family import check_graphs
from helpers.tokenizer_files import SPECIAL, trained_file

pytestmark = pytest.mark.slow  # exports whole graphs

CONVOLUTIONAL = {"text_layers": 1, "decoder_layers": 1}
TRANSFORMER = {
    **CONVOLUTIONAL,
    "image_encoder": "vit_base_patch32_clip_224",
    "image_encoder_args": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    **{"pooler": "cascade", "pooler_queries": 5, "cls_mask": "legacy", "tokenizer": "clip"},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[CoCa, Path]:
    """A model that ends captions at many places, and its export, which keeps the weights beside the graphs."""
    torch.manual_seed(0)
    model = create_model("coca_tiny", **TRANSFORMER).eval()
    with torch.no_grad():
        model.decoder.vocabulary.weight[model.tokenizer.eot_id] *= 4
    folder = tmp_path_factory.mktemp("exports")
    save_model(model, folder / "checkpoint.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "ONE_FILE", 0)
        choice = [f"checkpoint={folder}/checkpoint.safetensors", f"output={folder}/graphs", "format=onnx"]
        cli.run(compose("export", choice))
    return model, folder / "graphs"


def test_graphs_with_two_poolers(tmp_path: Path) -> None:
    arguments = CONVOLUTIONAL | {"pooler": "openclip_cascade", "pooler_queries": 5}
    check_graphs(create_model("coca_tiny", **arguments).eval(), tmp_path)


def test_graphs_beside_a_tokenizer_of_a_file(tmp_path: Path) -> None:
    file = {"file": str(trained_file("Metaspace", tmp_path)), **SPECIAL}
    check_graphs(create_model("coca_tiny", **CONVOLUTIONAL, tokenizer=file).eval(), tmp_path)


def test_the_config_has_the_bias_of_a_sigmoid_model(tmp_path: Path) -> None:
    model = create_model("coca_tiny", **CONVOLUTIONAL | {"decoder_layers": 0}, contrastive="siglip").eval()
    onnx.write_onnx(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["logit_bias"] == -10  # where SigLIP begins


def images_of(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def session(folder: Path, name: str) -> Any:
    return onnxruntime.InferenceSession(folder / f"{name}.onnx")


def test_features(exported: tuple[CoCa, Path]) -> None:
    model, folder = exported
    images, tokens = images_of(5), model.tokenizer(["a red circle", "!#$", "dog " * 90, ""])
    found = session(folder, "image_encoder").run(["features"], {"images": images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model.encode_image(images).detach(), atol=1e-5, rtol=0)
    found = session(folder, "text_encoder").run(None, {"tokens": tokens.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model.encode_text(tokens).detach(), atol=1e-5, rtol=0)


def test_greedy_captions_token_for_token(exported: tuple[CoCa, Path]) -> None:
    model, folder = exported
    captioner = Captioner(folder)
    for count in (8, 1):
        images = images_of(count)
        expected = model.generate(images)
        ids = captioner.write(images.numpy())
        assert ids.tolist() == expected.tolist()
        assert [captioner.decode(row) for row in ids] == [model.tokenizer.decode(row) for row in expected]
    assert len({(row == model.tokenizer.eot_id).nonzero()[0].item() for row in model.generate(images_of(8))}) > 2
    assert captioner.write(images.numpy(), 7).tolist() == model.generate(images, max_length=7).tolist()
    with pytest.raises(ValueError, match=r"2 .*24.*25"):
        captioner.write(images.numpy(), 25)


def test_a_prompt_read_at_once_equals_one_read_token_by_token(exported: tuple[CoCa, Path]) -> None:
    model, folder = exported
    decoder = session(folder, "decoder")
    _, keys, values = session(folder, "image_encoder").run(None, {"images": images_of(2).numpy()})
    image = {"image_keys": keys, "image_values": values}
    layers, _, heads, _, width = next(x.shape for x in decoder.get_inputs() if x.name == "past_keys")
    empty = np.zeros((layers, 2, heads, 0, width), np.float32)
    tokens = model.tokenizer(["a red circle", "two blue squares"])[:, :4].numpy()
    at_once = decoder.run(None, {"tokens": tokens, **image, "past_keys": empty, "past_values": empty})
    past = (empty, empty)
    for i in range(4):
        feed = {"tokens": tokens[:, i : i + 1], **image, "past_keys": past[0], "past_values": past[1]}
        logits, *past = decoder.run(None, feed)
    for a, b in zip(at_once, (logits, *past), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    hidden = model.decoder(model.text(torch.from_numpy(tokens), torch.tensor([4, 4]))[0], image_tokens(model))
    np.testing.assert_allclose(at_once[0], model.decoder.vocabulary(hidden[:, 3]).detach().numpy(), atol=1e-4)


def image_tokens(model: CoCa) -> torch.Tensor:
    return model.pooling(model.image_encoder(images_of(2)))[1]


@pytest.mark.parametrize("size", [(51, 77), (20, 31)])
def test_photos_are_read_as_in_evaluation(exported: tuple[CoCa, Path], tmp_path: Path, size: tuple[int, int]) -> None:
    _, folder = exported
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    deep = np.linspace(0, 65535, num=size[0] * size[1]).astype(np.uint16).reshape(size)
    Image.fromarray(deep).save(tmp_path / "deep.png")  # 16 bits of grey
    for name in ("photo.png", "deep.png"):
        expected = build_transform(size=32)(source_of(tmp_path / name)())
        assert np.array_equal(Captioner(folder).read_image(tmp_path / name), expected.numpy())


def test_the_captioner_is_a_program(exported: tuple[CoCa, Path], tmp_path: Path) -> None:
    model, folder = exported
    Image.fromarray(images_of(1)[0].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    command = [sys.executable, str(folder / "captioner.py"), "photo.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.stdout == f"photo.png\t{model.tokenizer.decode(model.generate(images_of(1))[0])}\n", done.stderr
    Image.new("RGB", (32, 32)).save(tmp_path / "page.jpg", "EPS")  # which Pillow would give to Ghostscript
    several = [*command, "page.jpg", *["photo.png"] * 17]
    again = subprocess.run(several, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert again.stdout == done.stdout * 18
    assert "skipped: page.jpg: " in again.stderr
    without = subprocess.run(command[:2], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert without.returncode == 1
    assert without.stderr.startswith("Captions from exported graphs")


def test_the_card_lists_the_files_and_its_code_runs_without_pytorch(exported: tuple[CoCa, Path]) -> None:
    model, folder = exported
    card = (folder / "README.md").read_text()
    names = {path.name for path in folder.iterdir()} - {"README.md", "__pycache__"}
    assert set(re.findall(r"^\| `(\S+)` \|", card, flags=re.MULTILINE)) == names
    assert "decoder.onnx.data" in names
    assert re.search(r"Largest difference .*: image_encoder \d\.\de-\d\d, text_encoder .*, decoder ", card)
    image = Image.effect_noise((32, 32), 99).convert("RGB")
    image.save(folder.parent / "photo.jpg", quality=95)
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0] + "assert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder.parent, capture_output=True, text=True, timeout=600)
    pixels = build_transform(size=32)(Image.open(folder.parent / "photo.jpg"))[None]
    assert done.stdout.startswith(f"{model.tokenizer.decode(model.generate(pixels)[0])}\n[["), done.stderr


def test_a_graph_that_computes_something_else_is_refused(
    exported: tuple[CoCa, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here that of another model, with one weight changed."""
    model, folder = exported
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(onnx, "_export", lambda graph, path: None)
    other = copy.deepcopy(model)
    onnx.write_onnx(other, tmp_path)
    other.decoder.norm.bias.data[0] += 1
    with pytest.raises(ValueError, match=r"decoder\.onnx.*differs"):
        onnx.write_onnx(other, tmp_path)
    monkeypatch.setattr(onnx, "_differences", lambda graph, path: iter((0.0, math.nan)))
    with pytest.raises(ValueError, match="differs by nan"):
        onnx.write_onnx(model, tmp_path)

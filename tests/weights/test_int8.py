"""int8 on disk: what is read equals what NumPy makes of the same file, and forged files are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file
from torch import Tensor

from coca_lit.data.transforms import build_transform
from coca_lit.models import CoCa
from coca_lit.weights.hub import PHOTOS_WEIGHTS
from coca_lit.weights.intact import load_tensors
from coca_lit.weights.load import MODEL_KEY, dequantised, load_model
from experiments.photos.quantise import quantised, save_quantised

Build = Callable[..., CoCa]
CAT = Path(__file__).resolve().parents[2] / "coca_lit" / "assets" / "photos" / "cat.jpg"
WEIGHT, SCALES = "text.token_embedding.weight", "text.token_embedding.weight.scales"


@pytest.fixture(scope="module")
def photos() -> CoCa:
    return load_model("photos")


def test_the_model_of_the_package_is_what_numpy_reads(photos: CoCa) -> None:
    stored, state = load_file(PHOTOS_WEIGHTS), photos.state_dict()
    for name, tensor in state.items():
        rows = stored[WEIGHT if name == "decoder.vocabulary.weight" else name]
        if rows.dtype == np.int8:
            name = WEIGHT if name == "decoder.vocabulary.weight" else name
            scales = stored[f"{name}.scales"].reshape(-1, *[1] * (rows.ndim - 1))
            rows = rows.astype(np.float32) * scales
        np.testing.assert_array_equal(tensor.numpy(), rows.astype(tensor.numpy().dtype), err_msg=name)
    assert sum(name.endswith(".scales") for name in stored) > 100
    assert PHOTOS_WEIGHTS.stat().st_size <= 20e6


def test_it_writes_words_that_it_knows(photos: CoCa) -> None:
    images = build_transform(**photos.preprocessing)(Image.open(CAT))[None]
    words = photos.tokenizer.decode(photos.generate(images, strategy="beam")[0]).split()
    assert len(words) > 3
    assert set(words) <= set(photos.tokenizer.spec)


def test_a_model_in_int8(tiny_model: Build, tmp_path: Path) -> None:
    model, path = tiny_model(tokenizer=["a", "b"], tied_embeddings=True), tmp_path / "model.safetensors"
    save_quantised(model, path)
    loaded = load_model(path)
    assert loaded.config == model.config
    assert loaded.decoder is not None
    assert loaded.decoder.vocabulary.weight is loaded.text.token_embedding.weight
    for name, tensor in loaded.state_dict().items():
        exact = model.state_dict()[name]
        step = exact.flatten(1).abs().amax(dim=1) / 127 if exact.ndim > 1 else exact.abs() / 2**9  # int8, fp16
        error = (tensor - exact).flatten(1).amax(dim=1) if exact.ndim > 1 else (tensor - exact).abs()
        assert (error <= step * 0.501 + 1e-12).all(), name


def test_numbers_that_fp16_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="'bias'"):
        quantised({"bias": torch.tensor([1.0, 1e6])})


@pytest.mark.parametrize(
    "forge",
    [
        lambda tensors: tensors.pop(SCALES),
        lambda tensors: tensors.update({SCALES: tensors[SCALES][:1].clone()}),
        lambda tensors: tensors[SCALES][:1].fill_(torch.nan),
        lambda tensors: tensors.update({SCALES: tensors[SCALES].long()}),
        lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].float()}),
        lambda tensors: tensors.update({f"{'a' * 9}.scales": torch.ones(3)}),
    ],
    ids=["none", "few", "no numbers", "whole numbers", "of floats", "of nothing"],
)
def test_forged_scales(tiny_model: Build, tmp_path: Path, forge: Callable[[dict[str, Tensor]], object]) -> None:
    path = tmp_path / "model.safetensors"
    save_quantised(tiny_model(), path)
    tensors, metadata = load_torch(path), load_tensors(path)[1]
    forge(tensors)
    save_file(tensors, path, metadata={MODEL_KEY: metadata[MODEL_KEY]})
    assert_refused(path, "scale")


def test_a_cut_file_and_a_changed_byte(tiny_model: Build, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_quantised(tiny_model(), path)
    content = path.read_bytes()
    changed = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    for damaged, said in ((content[:-100], "not a readable"), (changed, "damaged")):
        path.write_bytes(damaged)
        assert_refused(path, said)


def assert_refused(path: Path, word: str) -> None:
    with pytest.raises(ValueError, match=word) as refused:
        load_model(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_vocabulary_is_left_out_only_where_it_is_tied(tiny_model: Build, tmp_path: Path) -> None:
    path, arguments = tmp_path / "model.safetensors", dict[str, Any](tokenizer=["a", "b"])
    save_quantised(tiny_model(**arguments), path)
    tensors, metadata = load_torch(path), load_tensors(path)[1]
    for name in ("decoder.vocabulary.weight", "decoder.vocabulary.weight.scales"):
        del tensors[name]
    save_file(tensors, path, metadata={MODEL_KEY: metadata[MODEL_KEY]})
    assert_refused(path, "decoder.vocabulary")


def test_a_parameter_of_an_encoder_may_be_called_scales() -> None:
    tensors = {"trunk.scales": torch.ones(3), "trunk.layer.scales": torch.ones(3), "w": torch.ones(2)}
    assert dequantised(tensors, tied=False) == tensors

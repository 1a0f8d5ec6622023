"""Image encoders, poolers and text towers from a package that is not ours."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import coca_lit
from coca_lit.errors import ConfigError
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, create_model, register_image_encoder, register_text_tower
from coca_lit.models.registry import IMAGE_ENCODERS, POOLERS, TEXT_TOWERS, build_from, import_modules
from coca_lit.models.text import ClassicDecoder, TextSizes, TextTower
from coca_lit.tools.plan.command import build_without_weights
from coca_lit.weights import MODEL_KEY
from coca_lit.weights.open_clip import from_open_clip, to_open_clip
from helpers.running import compose

PACKAGE = '''
import torch
from torch import nn

from coca_lit.models import register_image_encoder, register_pooler, register_text_tower
from coca_lit.models.poolers import Pooling
from coca_lit.models.text import TextTower


@register_image_encoder("patches")
class Patches(nn.Module):
    """Pixels in patches, each through a linear layer and a batch norm."""

    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, image_size, size=8, width=48):
        super().__init__()
        self.width = width
        self.project = nn.Conv2d(3, width, size, size)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, images):
        return self.norm(self.project(images))


@register_pooler("strongest")
class Strongest(Pooling):
    """The largest value of each channel, and all tokens scaled."""

    def __init__(self, sizes, scale=1.0):
        super().__init__(sizes)
        self.vector_width = self.token_width = sizes.encoder.width
        self.scale = scale
        self.norm = nn.LayerNorm(self.vector_width)

    def parts_of_loss(self, loss):
        return ["norm"] if loss == "contrastive" else []

    def init_parameters(self):
        self.norm.reset_parameters()

    def pool(self, tokens, contrastive, captioning):
        vector = self.norm(tokens.amax(dim=1)) if contrastive else None
        return vector, (self.scale * tokens if captioning else None)

    def attention(self, tokens):
        return torch.eye(tokens.shape[1]).expand(len(tokens), -1, -1)


@register_text_tower("shifted")
def shifted(shift=1.0, **sizes):
    class Shifted(TextTower):
        def _embed(self, *arguments):
            return super()._embed(*arguments) + shift

    return Shifted(**sizes)
'''
GUESTS = {
    "image_encoder": "patches",
    "image_encoder_args": {"size": 4},
    "pooler": "strongest",
    "pooler_args": {"scale": 0.5},
    "text_tower": "shifted",
    "text_tower_args": {"shift": 0.5},
}


@pytest.fixture(autouse=True)
def forget_guests() -> Iterator[None]:
    built_in = [(registry, dict(registry._factories)) for registry in (IMAGE_ENCODERS, POOLERS, TEXT_TOWERS)]
    yield
    sys.modules.pop("their_package", None)
    for registry, factories in built_in:
        registry._factories.clear()
        registry._factories.update(factories)


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package outside of ours that can be imported and is not imported yet."""
    (tmp_path / "their_package.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)


def guest() -> CoCa:
    torch.manual_seed(0)
    return create_model("coca_tiny", imports=["their_package"], **GUESTS)


def inputs(model: CoCa) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, model.tokenizer(["a red circle", "a blue square left of a star"])


def read_again(model: CoCa, folder: Path) -> CoCa:
    """The model in evaluation as its file gives it, which encodes images to the same bits."""
    coca_lit.save_model(model.eval(), folder / "model.safetensors")
    again = coca_lit.load_model(folder / "model.safetensors")
    images, _ = inputs(model)
    assert torch.equal(again.encode_image(images), model.encode_image(images))
    return again


def test_guests_train_and_write() -> None:
    model = guest().train()
    images, tokens = inputs(model)
    sum(loss_terms(model(images, tokens)).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.image_encoder(images).shape == (2, 64, 48)
    assert model.image_encoder.normalise.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert model.generate(images, max_length=6).shape == (2, 6)
    with pytest.raises(ValueError, match="set_grad_checkpointing"):
        model.set_grad_checkpointing("blocks")
    model.set_grad_checkpointing("cross_attention")


def test_a_file_stores_names_and_plain_arguments(tmp_path: Path) -> None:
    model = guest().eval()
    stored = {key: getattr(model.config, key) for key in GUESTS}
    assert stored == GUESTS | {
        "image_encoder": "their_package:patches",
        "pooler": "their_package:strongest",
        "text_tower": "their_package:shifted",
    }
    again = read_again(model, tmp_path)
    _, tokens = inputs(model)
    assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))
    assert again.config == model.config


class Unusual(nn.Module):
    """Parametrized weights, a batch norm of one's own and a buffer that is still empty."""

    mean = std = (0.5, 0.5, 0.5)
    width = 48

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.project = parametrizations.weight_norm(nn.Conv2d(3, 48, 8, 8))
        self.mix = parametrizations.spectral_norm(nn.Conv2d(48, 48, 1))
        self.norm = Rectified(48)
        self.register_buffer("seen", torch.empty(0))

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.mix(self.project(images)))


class Rectified(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_unusual_parts_train_and_are_read_again(tmp_path: Path) -> None:
    register_image_encoder("unusual")(Unusual)
    torch.manual_seed(0)
    model = create_model("coca_tiny", image_encoder="unusual")
    images, tokens = inputs(model)
    for _ in range(2):
        sum(loss_terms(model.train()(images, tokens)).values()).backward()
    assert model.eval().image_encoder(images).min() == 0
    coca_lit.save_model(model, tmp_path / "model.safetensors")
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, MODEL_KEY: model.config.stored()}, tmp_path / "last.ckpt")
    for file in ("model.safetensors", "last.ckpt"):
        again = coca_lit.load_model(tmp_path / file).eval()
        assert torch.equal(again.encode_image(images), model.encode_image(images))


def test_whoever_registers_a_part_of_a_third_package_is_its_module() -> None:
    import_modules(["their_package"])
    patches = IMAGE_ENCODERS.get("patches")
    register_image_encoder("theirs")(patches)
    register_image_encoder("small")(partial(patches, width=8))
    for name in ("theirs", "small"):
        assert IMAGE_ENCODERS.spec(name) == f"{__name__}:{name}"
        assert IMAGE_ENCODERS.get(f"{__name__}:{name}") is IMAGE_ENCODERS.get(name)
    register_image_encoder("small")(partial(patches, width=16))  # once more, as when a module is reloaded
    with pytest.raises(ValueError, match=f"'small' is already registered by the module '{__name__}'"):
        register_image_encoder("small")(Unusual)


def test_a_name_of_another_package_is_another_part(tmp_path: Path) -> None:
    model = guest()
    assert IMAGE_ENCODERS.get("their_package.moved:patches") is IMAGE_ENCODERS.get("patches")
    assert IMAGE_ENCODERS.get("other_package:patches") is None
    model.config = replace(model.config, image_encoder="other_package:patches")
    coca_lit.save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="other_package"):
        coca_lit.load_model(tmp_path / "model.safetensors")


def test_image_size_of_guests() -> None:
    """A convolution takes any size; weights that depend on the size need a method that changes them."""
    import_modules(["their_package"])
    patches = IMAGE_ENCODERS.get("patches")

    @register_image_encoder("placed")
    class Placed(patches):
        def __init__(self, image_size: int) -> None:
            super().__init__(image_size)
            self.positions = nn.Parameter(torch.zeros(48, image_size // 8, image_size // 8))

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + self.positions

    model = create_model("coca_tiny", **GUESTS)
    model.set_image_size(48)
    assert model.image_encoder(torch.zeros(1, 3, 48, 48)).shape == (1, 12 * 12, 48)
    model = create_model("coca_tiny", image_encoder="placed", image_encoder_args={})
    with pytest.raises(ValueError, match=r"32.*48.*set_input_size"):
        model.set_image_size(48)
    assert model.image_size == 32


def test_arguments_of_guests_are_their_own(tmp_path: Path) -> None:
    """Neither names nor numbers are taken for timm's; only what may name a file is refused."""
    import_modules(["their_package"])
    patches, shifted = IMAGE_ENCODERS.get("patches"), TEXT_TOWERS.get("shifted")

    @register_image_encoder("free")
    def _(image_size: int, feature_dim: int, theta: float, **rest: object) -> nn.Module:
        return patches(image_size, width=feature_dim)

    register_text_tower("free")(lambda theta, **sizes: shifted(theta, **sizes))
    arguments = {"image_encoder_args": {"feature_dim": 24, "theta": 1e6}, "text_tower_args": {"theta": 1e6}}
    model = create_model("coca_tiny", image_encoder="free", text_tower="free", **arguments).eval()
    read_again(model, tmp_path)
    model.config.image_encoder_args["checkpoint_path"] = "evil.pth"
    coca_lit.save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"image_encoder_args\.checkpoint_path"):
        coca_lit.load_model(tmp_path / "model.safetensors")


def test_what_a_guest_derives_from_its_first_values_is_as_before(tmp_path: Path) -> None:
    """Here a fixed random projection, which no file holds."""
    import_modules(["their_package"])
    patches = IMAGE_ENCODERS.get("patches")

    @register_image_encoder("projected")
    class Projected(patches):
        def __init__(self, image_size: int) -> None:
            super().__init__(image_size)
            with torch.random.fork_rng():
                torch.manual_seed(3)
                self.fixed = [nn.Linear(48, 48)]  # a list is no module

        def forward(self, images: Tensor) -> Tensor:
            return self.fixed[0](super().forward(images).flatten(2).mT)

    model = create_model("coca_tiny", image_encoder="projected", image_encoder_args={}).eval()
    read_again(model, tmp_path)


def test_what_a_guest_derives_is_as_before_with_tensors_of_open_clip() -> None:
    """Where a tower from outside takes the place of OpenCLIP's."""

    class Offset(TextTower):
        def __init__(self, **sizes: Any) -> None:
            super().__init__(**sizes)
            with torch.random.fork_rng():
                torch.manual_seed(3)
                self.fixed = [nn.Linear(4, 4)]  # a list is no module

    register_text_tower("offset")(Offset)
    trunk = {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1}
    encoder = {"image_encoder": "vit_base_patch32_clip_224", "image_encoder_args": trunk}
    model = create_model("coca_tiny", **encoder, tokenizer="clip", text_tower="offset")
    state = to_open_clip(create_model("coca_tiny", **encoder, tokenizer="clip"))
    guest, own = from_open_clip(state, text_tower="offset"), from_open_clip(state)
    assert torch.equal(guest.text.fixed[0].weight, model.text.fixed[0].weight)
    torch.testing.assert_close(guest.state_dict(), own.state_dict(), atol=0, rtol=0)


def test_a_guest_whose_constructor_reads_tensors_is_loaded(tmp_path: Path) -> None:
    """As the rates of stochastic depth are often made; tensors without memory have no values."""
    import_modules(["their_package"])
    patches = IMAGE_ENCODERS.get("patches")

    @register_image_encoder("deep")
    def _(image_size: int) -> nn.Module:
        assert [rate.item() for rate in torch.linspace(0, 0.1, 3)] == pytest.approx([0, 0.05, 0.1])
        return patches(image_size)

    model = create_model("coca_tiny", image_encoder="deep", image_encoder_args={}).eval()
    read_again(model, tmp_path)
    with pytest.raises(ConfigError, match='device="cpu"'):
        build_without_weights(compose("model.net.name=coca_tiny", "model.net.image_encoder=deep"))


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_reading_a_file_imports_nothing_by_itself(tmp_path: Path, kind: str) -> None:
    model, path = guest().eval(), tmp_path / f"model.{kind}"
    if kind == "ckpt":
        state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": state, "coca_lit_model": model.config.stored()}, path)
    else:
        coca_lit.save_model(model, path)
    del sys.modules["their_package"]
    for registry in (IMAGE_ENCODERS, POOLERS, TEXT_TOWERS):
        registry._factories.clear()
    with pytest.raises(ValueError, match=r"'patches'.*imports=\['their_package'\]"):
        coca_lit.load_model(path)
    assert "their_package" not in sys.modules
    images, _ = inputs(model)
    again = coca_lit.load_model(path, imports=["their_package"])
    assert torch.equal(again.encode_image(images), model.encode_image(images))


def test_errors() -> None:
    register_image_encoder("other")(nn.Identity)
    register_image_encoder("other")(nn.Identity)  # the same once more, as after a reload
    with pytest.raises(ValueError, match=rf"'other'.*'{__name__}'"):
        register_image_encoder("other")(nn.Linear)
    with pytest.raises(ValueError, match="'a:b'"):
        register_image_encoder("a:b")
    with pytest.raises(ValueError, match=r"'othr'.*other"):
        create_model("coca_tiny", image_encoder="othr")
    with pytest.raises(ValueError, match=r"'image_encoder_args\.sze'.*'size'"):
        create_model("coca_tiny", imports=["their_package"], image_encoder="patches", image_encoder_args={"sze": 4})
    with pytest.raises(ValueError, match="'lstm'"):
        create_model("coca_tiny", text_tower="lstm")
    with pytest.raises(ValueError, match=r"imports.*'not_there'"):
        create_model("coca_tiny", imports=["not_there"])


def test_a_part_of_a_project_that_is_not_installed() -> None:
    """As in a checkpoint from where it was."""
    for part in ("pooler", "text_tower", "image_encoder"):
        with pytest.raises(ValueError, match=r"'mine'; the project 'absent' is not installed\. It comes with"):
            create_model("coca_tiny", **{part: "coca_lit.projects.absent.parts:mine"})


def test_a_file_names_the_package_of_a_pooler(tmp_path: Path) -> None:
    """The pooler alone is from outside."""
    model = create_model("coca_tiny", imports=["their_package"], pooler="strongest").eval()
    coca_lit.save_model(model, tmp_path / "model.safetensors")
    POOLERS._factories.clear()
    with pytest.raises(ValueError, match=r"'strongest'.*imports=\['their_package'\]"):
        coca_lit.load_model(tmp_path / "model.safetensors")


def test_arguments_of_poolers_and_decoders() -> None:
    """A wrong one is named as it is typed; so is one that is missing."""
    import_modules(["their_package"])

    class Thinned(ClassicDecoder):
        def __init__(self, keep: float = 1.0, **others: Any) -> None:
            super().__init__(**others)

    @register_text_tower("thinned")
    class ThinnedTower(TextTower):
        def __init__(self, sizes: TextSizes, rate: float) -> None:
            super().__init__(sizes)

        def make_decoder(self, sizes: TextSizes, image_width: int, layers: int, **arguments: Any) -> Thinned:
            given = {"sizes": sizes, "image_width": image_width, "layers": layers}
            return build_from(Thinned, "decoder_args", given, arguments)

    tower = {"text_tower": "thinned", "text_tower_args": {"rate": 0.5}}
    assert isinstance(create_model("coca_tiny", **tower, decoder_args={"keep": 0.5}).decoder, Thinned)
    with pytest.raises(ValueError, match=r"'decoder_args\.kep'.*'keep'"):
        create_model("coca_tiny", **tower, decoder_args={"kep": 0.5})
    with pytest.raises(ValueError, match=r"text_tower_args\.rate is missing"):
        create_model("coca_tiny", text_tower="thinned")
    with pytest.raises(ValueError, match=r"'pooler_args\.scal'.*'scale'"):
        create_model("coca_tiny", pooler="strongest", pooler_args={"scal": 0.5})
    with pytest.raises(ValueError, match=r"'pooler_args\.scale'"):
        create_model("coca_tiny", pooler="single", pooler_args={"scale": 0.5})
    with pytest.raises(ValueError, match=r"'strongst'.*strongest"):
        create_model("coca_tiny", pooler="strongst")

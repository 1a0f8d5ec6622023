"""With kernels on and off a model computes the same, and off means plain PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, create_model
from coca_lit.models.kernels import cpu_linear, disabled, fast_attention, timm_layers
from helpers.slow import slow

VIT = {
    "image_encoder": "vit_base_patch32_clip_224",
    "image_encoder_args": {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
}
MODELS: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "vit, legacy mask": {**VIT, "cls_mask": "legacy", "pooler": "cascade"},
    "resnet": {},
    "efficientnet": {"image_encoder": "tf_efficientnet_lite0", "image_encoder_args": {}, "image_size": 64},
}
NAMES = ("vit, legacy mask", "resnet", *slow("vit", "efficientnet"))
# Every function that is not plain PyTorch.
FAST = [
    (cpu_linear, "_onednn"),
    (cpu_linear, "_weights_left"),
    (fast_attention, "attend_text_by_text"),
    (fast_attention, "attend_without_kv"),
    (timm_layers, "attend_text_by_text"),
]


def batch(model: CoCa) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 20, 2, 9])
    tokens = torch.randint(4, 40, (4, 24), generator=generator)
    tokens[torch.arange(24) >= lengths[:, None]] = 0
    return (
        torch.randint(0, 256, (4, 3, *[model.image_size] * 2), generator=generator, dtype=torch.uint8),
        tokens,
        lengths,
    )


def build(name: str) -> CoCa:
    torch.manual_seed(0)
    return create_model("coca_tiny", **MODELS[name])


def train(name: str, bf16: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What a training step computes."""
    model = build(name).train().to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(*batch(model))
        terms = loss_terms(out)
    sum(terms.values()).backward()
    found = [*terms.values(), out.image_features, out.text_features, out.hidden]
    return [t.detach().double() for t in (*found, *(p.grad for p in model.parameters()))]


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    squares = [((a - b).square().sum(), b.square().sum()) for a, b in zip(found, exact, strict=True)]
    return (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt().item()


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_is_the_same(name: str) -> None:
    fast = train(name, bf16=False)
    with disabled():
        assert distance(fast, train(name, bf16=False)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_in_bf16_is_as_exact(name: str) -> None:
    fast = train(name, bf16=True)
    with disabled():
        plain, exact = train(name, bf16=True), train(name, bf16=False, dtype=torch.float64)
    assert distance(fast, exact) < 1.5 * distance(plain, exact)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{}, {"strategy": "beam", "num_beams": 3, "num_captions": 2}], ids=["greedy", "beam"]
)
def test_captions_are_the_same(name: str, options: dict[str, Any]) -> None:
    model = build(name).eval()
    images, _, _ = batch(model)
    fast = model.generate(images, return_scores=True, max_length=12, **options)
    with disabled():
        plain = model.generate(images, return_scores=True, max_length=12, **options)
    assert torch.equal(fast.ids, plain.ids)
    torch.testing.assert_close(fast.log_probs, plain.log_probs)


def use_everything() -> None:
    """Training and writing, in fp32 and bf16."""
    train("vit", bf16=True)
    model = build("vit").eval()
    images, _, _ = batch(model)
    model.generate(images, max_length=5)
    with torch.no_grad():
        model.encode_image(images)
    model.bfloat16().generate(images, max_length=5)


def test_off_means_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()
    for module, function in FAST:
        original = getattr(module, function)

        def spy(*args: Any, original: Any = original, name: str = f"{module.__name__}.{function}") -> Any:
            called.add(name)
            return original(*args)

        monkeypatch.setattr(module, function, spy)
    use_everything()
    assert called == {f"{module.__name__}.{function}" for module, function in FAST}
    called.clear()
    with disabled():
        use_everything()
    assert not called

"""The vision transformer computes what timm's and OpenCLIP's compute, in other ways."""

import copy
from unittest import mock

import open_clip
import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn
from torch.testing import assert_close

from coca_lit.models.image import ImageEncoder
from coca_lit.models.kernels import cpu_linear, replace_timm_layers, timm_layers
from coca_lit.models.kernels.timm_layers import Depthwise, PatchProjection, ShortAttention

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def test_patches_times_weights_are_a_convolution() -> None:
    torch.manual_seed(0)
    plain, fast = nn.Conv2d(3, 16, 8, 8).double(), PatchProjection(3, 16, 8, 8).double()
    fast.load_state_dict(plain.state_dict())
    for size in ((32, 24), (35, 20)):  # what is left over at the edges is dropped
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        assert_close(fast(x), plain(x))
        for conv in (plain, fast):
            conv(x).square().sum().backward()
    assert_close(fast.weight.grad, plain.weight.grad)
    assert_close(fast.bias.grad, plain.bias.grad)


def test_short_attention_in_bf16_is_that_of_timm() -> None:
    torch.manual_seed(0)
    plain = Attention(32, 2, qkv_bias=True)
    fast = ShortAttention(copy.deepcopy(plain))
    assert fast.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(3, 10, 32)
    exact = plain(x)
    assert torch.equal(fast(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = fast(x), plain(x)
    assert out.grad_fn is not None
    assert (out - exact).norm() < 2 * (expected - exact).norm()
    found, exact_gradients = (
        torch.autograd.grad(y.float().square().sum(), m.parameters()) for y, m in ((out, fast), (exact, plain))
    )
    for a, b in zip(found, exact_gradients, strict=True):
        assert (a - b).norm() < 0.03 * b.norm() + 1e-3


def test_probabilities_are_dropped_in_training_as_timm_does() -> None:
    torch.manual_seed(0)
    plain = Attention(32, 2, qkv_bias=True, attn_drop=0.3)
    fast, x, outputs = ShortAttention(copy.deepcopy(plain)), torch.randn(3, 10, 32), []
    for bf16 in (False, True):
        for layer in (plain, fast):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs.append(layer.train()(x))
                outputs.append(layer.eval()(x))
    for found, expected in zip(outputs[2::4] + outputs[3::4], outputs[::4] + outputs[1::4], strict=True):
        assert torch.equal(found, expected)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)


@pytest.mark.parametrize(("size", "short"), [(40, True), (48, False)], ids=["26 tokens", "37 tokens"])
def test_it_is_used_in_bf16_training_while_probabilities_are_no_larger_than_queries(size: int, short: bool) -> None:
    encoder = ImageEncoder("vit_base_patch32_clip_224", size, **VIT | {"embed_dim": 64})  # heads of width 32
    images = torch.randn(1, 3, size, size)
    with mock.patch.object(timm_layers, "attend_text_by_text", wraps=timm_layers.attend_text_by_text) as spy:
        encoder(images)
        with torch.autocast("cpu", torch.bfloat16):
            encoder.eval()(images)
            assert not spy.called
            encoder.train()(images)
        assert spy.called == short


def test_without_gradients_its_linear_layers_choose_their_way_and_give_the_same() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder("vit_base_patch32_clip_224", 40, **VIT).eval()
    images = torch.randn(2, 3, 40, 40)
    expected = encoder(images)
    with torch.no_grad(), mock.patch.object(cpu_linear, "_onednn", wraps=cpu_linear._onednn) as product:
        found = encoder(images)
    assert product.call_count == 1 + 4 * VIT["depth"]  # patches; queries with keys and values, output, MLP
    assert_close(found, expected)


def test_what_it_does_not_know_stays() -> None:
    trunk = timm.create_model("vit_base_patch32_clip_224", qk_norm=True, img_size=32, **VIT)
    replace_timm_layers(trunk)
    assert type(trunk.blocks[0].attn) is Attention
    assert type(trunk.patch_embed.proj) is PatchProjection


@pytest.mark.parametrize("rate", [0.5, 0.99])
def test_patch_dropout_keeps_as_many_patches_as_openclip_and_the_class_token(rate: float) -> None:
    """FLIP (Li et al. 2023, arXiv 2212.00794): `image_encoder_args={patch_drop_rate: 0.5}`."""
    torch.manual_seed(0)
    encoder = ImageEncoder("vit_base_patch32_clip_224", 40, **VIT, patch_drop_rate=rate)
    x = torch.arange(26.0).view(1, 26, 1).expand(4, 26, 32)  # CLS is token 0
    kept = encoder.trunk.patch_drop(x)[:, :, 0]
    theirs = open_clip.transformer.PatchDropout(rate)(x)
    assert kept.shape == theirs.shape[:2]
    assert (kept[:, 0] == 0).all()
    assert all(len(set(row.tolist())) == len(row) for row in kept)
    images = torch.randn(2, 3, 40, 40)
    assert encoder(images).shape == (2, theirs.shape[1], 32)
    assert encoder.eval()(images).shape == (2, 26, 32)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto"])
def test_convolutions_with_channels_last_are_those_of_timm(name: str) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=0, global_pool="").double().eval()
    encoder = ImageEncoder(name, 64).double().eval()
    encoder.trunk.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert encoder.trunk(x).is_contiguous(memory_format=torch.channels_last)
    found, expected = encoder(x), plain(x).flatten(2).transpose(1, 2)
    assert_close(found, expected)
    found.square().mean().backward()
    expected.square().mean().backward()
    for ours, theirs in zip(encoder.trunk.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto"])
def test_depthwise_convolutions_are_trained_in_fp32(name: str) -> None:
    """Under autocast to bf16: no farther from fp32 than timm's, and what is not trained stays in bf16."""
    torch.manual_seed(0)
    trunk = timm.create_model(name)
    path, plain = next(
        (path, module)
        for path, module in trunk.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups > 1 and module.stride == (1, 1)
    )
    plain = copy.deepcopy(plain)
    replace_timm_layers(trunk)
    fast = trunk.get_submodule(path)
    assert isinstance(fast, Depthwise)
    assert isinstance(fast, type(plain))
    x = torch.randn(2, plain.in_channels, 12, 12)
    exact = plain(x)
    exact_gradient = torch.autograd.grad(exact.square().sum(), plain.weight)[0]
    distances = {}
    with torch.autocast("cpu", torch.bfloat16):
        for way, module in (("plain", plain), ("fast", fast)):
            out = module(x)
            gradient = torch.autograd.grad(out.float().square().sum(), module.weight)[0]
            distances[way] = (out - exact).norm(), (gradient - exact_gradient).norm()
        with torch.no_grad():
            assert fast(x).dtype == torch.bfloat16
            assert_close(fast(x), plain(x))
    assert all(ours <= theirs for ours, theirs in zip(distances["fast"], distances["plain"], strict=True))
    assert distances["fast"][0] < 1e-6 * exact.norm()
    for module in (plain, fast):
        module.bfloat16()
    torch.testing.assert_close(fast(x.bfloat16()), plain(x.bfloat16()))

"""Clips in the place of images: what poolings make of frames, against plain loops over frames."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.errors import DataError
from coca_lit.models import CLIP, CoCa, create_model
from coca_lit.projects.classification.classifier import PoolerClassifier
from coca_lit.projects.video.inputs import Clips, set_frame_pooling
from coca_lit.weights.lora import add_lora
from coca_lit.weights.start import copy_weights

POOLERS = ("single", "parallel", "cascade", "openclip_parallel", "openclip_cascade", "means_of_tokens")
VIT = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 2}
ENCODER = {"image_encoder": "vit_base_patch32_clip_224", "image_encoder_args": VIT, "image_size": 16}


def build(pooler: str = "single", **arguments) -> CoCa:
    torch.manual_seed(0)
    imports = ["helpers.means_of_tokens"]
    return create_model("coca_tiny", imports=imports, pooler=pooler, pooler_queries=5, **ENCODER, **arguments).eval()


def clips(frames: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, frames, 3, 16, 16), dtype=torch.uint8, generator=generator)


def both(model: CoCa, images: Tensor) -> tuple[Tensor, Tensor]:
    """Of images (B, 3, H, W) or clips (B, F, 3, H, W)."""
    images = Clips(images) if images.ndim == 5 else images
    with torch.no_grad():
        return model.encode_image(images), model.encode_image_tokens(images)


@pytest.mark.parametrize("frame_pooling", ["tokens", "mean"])
@pytest.mark.parametrize("pooler", POOLERS)
def test_one_frame_is_an_image(pooler: str, frame_pooling: str) -> None:
    model, images = build(pooler, frame_pooling=frame_pooling), clips(1)
    for clip, image in zip(both(model, images), both(model, images[:, 0]), strict=True):
        assert torch.equal(clip, image)
    options = {"strategy": "greedy", "max_length": 8}
    assert torch.equal(model.generate(Clips(images), **options), model.generate(images[:, 0], **options))


@pytest.mark.parametrize("frame_pooling", ["tokens", "mean"])
@pytest.mark.parametrize("pooler", POOLERS)
def test_the_order_of_frames_has_no_effect(pooler: str, frame_pooling: str) -> None:
    model, images = build(pooler, frame_pooling=frame_pooling), clips()
    (features, tokens), (others, other_tokens) = both(model, images), both(model, images[:, [2, 0, 3, 1]])
    torch.testing.assert_close(features, others)
    if pooler != "means_of_tokens" or frame_pooling == "mean":  # else it has all tokens
        torch.testing.assert_close(tokens, other_tokens)
    assert not torch.allclose(features, both(model, images[:, [0, 0, 3, 1]])[0], atol=1e-4)


def test_positions_tell_the_order() -> None:
    model, images = build(frame_positions=4), clips()
    plain = build()
    for a, b in zip(both(model, images), both(plain, images), strict=True):
        torch.testing.assert_close(a, b)  # they start at zero
    with torch.no_grad():
        model.pooling.frame_positions.normal_()
    assert not torch.allclose(both(model, images)[0], both(model, images.flip(1))[0], atol=1e-3)
    assert torch.equal(both(model, images[:, 0])[0], both(plain, images[:, 0])[0])  # an image has no position
    with pytest.raises(DataError, match="positions for 4 frames, got clips of 2: set frames=4"):
        model.encode_image(Clips(images[:, :2]))


@pytest.mark.parametrize("pooler", POOLERS)
def test_mean_of_frames(pooler: str) -> None:
    model, images = build(pooler, frame_pooling="mean"), clips()
    with torch.no_grad():
        vectors = torch.stack([model.encode_image(images[:, i], normalize=False) for i in range(4)])
        tokens = torch.stack([model.encode_image_tokens(images[:, i]) for i in range(4)])
    features, pooled = both(model, images)
    torch.testing.assert_close(features, F.normalize(vectors.sum(dim=0) / 4, dim=-1))
    torch.testing.assert_close(pooled, tokens.sum(dim=0) / 4)


def test_tokens_of_all_frames() -> None:
    """The attention of the pooler written out for one head after the other, over the tokens of all frames."""
    model, images = build("parallel"), clips()
    pooler = model.pooling.contrastive
    with torch.no_grad():
        rows = torch.cat([model.image_encoder(images[:, i]) for i in range(4)], dim=1)  # (B, F · S, C)
        context, query = pooler.norm_context(rows), pooler.norm_query(pooler.query)
        attention = pooler.attention
        q, (k, v) = attention.q(query), attention.kv(context).chunk(2, dim=-1)
        width, found = q.shape[-1] // attention.heads, []
        for head in range(attention.heads):
            part = slice(head * width, (head + 1) * width)
            weights = torch.exp(q[:, part] @ k[..., part].transpose(1, 2) / width**0.5)  # (B, 1, F · S)
            found.append(weights / weights.sum(dim=-1, keepdim=True) @ v[..., part])
        vector = pooler.norm_out(attention.out(torch.cat(found, dim=-1)))[:, 0]
        expected = F.normalize(model.image_projection(vector), dim=-1)
    torch.testing.assert_close(both(model, images)[0], expected, atol=1e-5, rtol=1e-4)


def test_mean_tokens_leave_out_class_tokens() -> None:
    model, images = build("means_of_tokens"), clips()
    with torch.no_grad():
        rows = torch.cat([model.image_encoder(images[:, i])[:, 1:] for i in range(4)], dim=1)
        expected = F.normalize(model.image_projection(rows.mean(dim=1)), dim=-1)
    features, tokens = both(model, images)
    torch.testing.assert_close(features, expected)
    assert tokens.shape[1] == 4 * 4


def test_the_way_can_be_changed_and_is_kept() -> None:
    model = build()
    before = both(model, clips())[0]
    model.set_option("frame_pooling", "mean")
    assert CoCa(model.config).pooling.options == {"frame_pooling": "mean"}
    assert CoCa(**model.config.stored()).config == model.config
    assert not torch.allclose(before, both(model, clips())[0], atol=1e-4)
    with pytest.raises(ValueError, match="frame_pooling must be 'tokens' or 'mean', got 'sum'"):
        model.set_option("frame_pooling", "sum")
    model.set_option("frame_pooling", "tokens")
    assert torch.equal(before, both(model, clips())[0])
    assert model.config == build().config
    with pytest.raises(ValueError, match="frame_positions"):
        build(frame_positions=-1)


def test_training_reaches_positions_and_trunk() -> None:
    model = build(frame_positions=4).train()
    tokens = model.tokenizer(["a red circle", "a blue ring", "a pink star"])
    out = model(Clips(clips()), tokens)
    (out.image_features.sum() + out.logits.logsumexp(-1).mean()).backward()
    assert model.pooling.frame_positions.grad.abs().sum(dim=(1, 2)).gt(0).all()
    assert next(model.image_encoder.parameters()).grad.abs().sum() > 0


def test_a_model_of_images_starts_one_of_clips() -> None:
    images, clip = build(), build(frame_positions=4, frame_pooling="mean")
    with torch.no_grad():
        images.pooling.generative.query.add_(1)
    copy_weights(images, clip, "images")
    assert torch.equal(images.pooling.generative.query, clip.pooling.generative.query)
    assert clip.pooling.frame_positions.eq(0).all()


def test_a_classifier_sees_all_frames() -> None:
    model, head = build(), PoolerClassifier(["a", "b"], heads=2)
    head.build(model)
    images = clips()
    with torch.no_grad():
        found = head.features_of(model, (), Clips(images))
        rows = torch.cat([model.image_encoder(images[:, i]) for i in range(4)], dim=1)
        torch.testing.assert_close(found, head.pooler(rows)[:, 0])


def test_clip_means_class_tokens() -> None:
    torch.manual_seed(0)
    model = CLIP(
        image_encoder_args=VIT, image_size=16, embed_dim=8, context_length=8, text_width=16, text_layers=1, text_heads=2
    ).eval()
    images = clips()
    with torch.no_grad():
        vectors = [model.encode_image(images[:, i], normalize=False) for i in range(4)]
        torch.testing.assert_close(model.encode_image(Clips(images)), F.normalize(sum(vectors) / 4, dim=-1))
        assert torch.equal(model.encode_image(Clips(images[:, :1])), model.encode_image(images[:, 0]))
    set_frame_pooling(model, "mean")
    with pytest.raises(ValueError, match="a CLIP embeds a clip as the mean"):
        set_frame_pooling(model, "tokens")


def test_positions_of_frames_train_beside_lora() -> None:
    """A model of images has none to start from."""
    model = create_model("coca_tiny", frame_positions=2)
    add_lora(model, rank=2)
    tokens = model.tokenizer(["a red circle"])
    model(Clips(torch.randn(1, 2, 3, 32, 32)), tokens).logits.square().mean().backward()
    assert model.pooling.frame_positions.grad.abs().sum() > 0

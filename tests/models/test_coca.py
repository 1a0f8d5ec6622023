"""The network as a whole: presets, what each part may see, padding, initial values, freezing, errors."""

from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.extensions import declared
from coca_lit.losses import caption_loss, contrastive_loss
from coca_lit.models import PRESETS, CoCa, CoCaOutput, create_model
from coca_lit.models.coca import CAPTION, CONTRASTIVE
from coca_lit.models.config import SIZES
from coca_lit.models.registry import POOLERS as REGISTRY
from coca_lit.models.text import ClsMask, legacy_attention_mask
from coca_lit.models.trainable import GradCheckpointing
from helpers.family import check_preset
from helpers.slow import slow

OWN_POOLERS = ("single", "parallel", "cascade", "openclip_parallel", "openclip_cascade")
POOLERS = (*OWN_POOLERS, *(name for name in declared("poolers") if REGISTRY.get(name).token_kind is None))
TEXT_TOWERS = [*declared("text_towers")]
CLS_MASKS: tuple[ClsMask, ...] = get_args(ClsMask)
TINY_VIT = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
# One of each kind of output: tokens, a grid with and without a norm or a convolution in the head, a grid with
# channels last.
ENCODERS: dict[str, dict[str, Any]] = {
    "vit_base_patch32_clip_224": TINY_VIT,
    "vit_tiny_patch16_224": {"depth": 2},
    "tf_efficientnet_lite0": {},
    "convnext_atto": {},
    "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
}
Build = Callable[..., CoCa]


def pixels(model: CoCa, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, model.image_size, model.image_size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def captions(model: CoCa, lengths: Sequence[int]) -> Tensor:
    """Random texts (B, context_length) with this many tokens each, start and end included."""
    tokenizer, generator = model.tokenizer, torch.Generator().manual_seed(2)
    tokens = torch.full((len(lengths), tokenizer.context_length), tokenizer.pad_id)
    for row, n in zip(tokens, lengths, strict=True):
        row[:n] = torch.randint(4, 40, (n,), generator=generator)
        row[0], row[n - 1] = tokenizer.sot_id, tokenizer.eot_id
    return tokens


def losses(out: CoCaOutput) -> Tensor:
    contrastive = contrastive_loss(out.image_features, out.text_features, out.logit_scale)
    return contrastive + 2 * caption_loss(out.hidden, out.vocabulary, out.labels)


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_when_made_small_and_builds_again_from_its_config(name: str) -> None:
    check_preset(name)


# ---------------------------------------------------------------- forward pass, for every pooler and both masks


VARIANTS = [("cascade", "correct"), ("single", "legacy")]
MORE = [
    pytest.param(v, marks=pytest.mark.slow)
    for v in [*((p, "correct") for p in POOLERS if p != "cascade"), ("cascade", "legacy")]
]


@pytest.fixture(params=[*VARIANTS, *MORE], ids="-".join)
def model(request: pytest.FixtureRequest, tiny_model: Build) -> CoCa:
    pooler, cls_mask = request.param
    return tiny_model(pooler=pooler, cls_mask=cls_mask)


def test_shapes_and_gradients(model: CoCa) -> None:
    tokens = captions(model, [5, 24, 3])
    out = model(pixels(model, 3), tokens)
    width = model.config.embed_dim
    assert out.image_features.shape == out.text_features.shape == (3, width)
    assert_close(out.image_features.norm(dim=-1), torch.ones(3))
    assert_close(out.text_features.norm(dim=-1), torch.ones(3))
    assert_close(out.logit_scale, torch.tensor([1 / 0.07]), 1e-4)
    assert out.labels.tolist() == [*tokens[0, 1:5].tolist(), *tokens[1, 1:].tolist(), *tokens[2, 1:3].tolist()]
    assert out.logits.shape == (len(out.labels), model.tokenizer.vocab_size)

    loss = losses(out)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_encoding_alone_equals_forward(model: CoCa) -> None:
    images, tokens = pixels(model, 2), captions(model, [5, 9])
    out = model(images, tokens)
    assert_close(model.encode_image(images), out.image_features)
    assert_close(model.encode_text(tokens), out.text_features)
    assert_close(F.normalize(model.encode_image(images, normalize=False), dim=-1), out.image_features)
    assert_close(F.normalize(model.encode_text(tokens, normalize=False), dim=-1), out.text_features)


def test_padding_and_batch_mates_change_nothing(model: CoCa) -> None:
    images, tokens = pixels(model, 3), captions(model, [5, 24, 23])
    together = model(images, tokens)
    first = 0
    for row, n in enumerate([5, 24, 23]):
        for shown in {n, 24}:
            alone = model(images[row : row + 1], tokens[row : row + 1, :shown])
            assert_close(alone.image_features[0], together.image_features[row])
            assert_close(alone.text_features[0], together.text_features[row])
            assert_close(alone.logits, together.logits[first : first + n - 1])
        first += n - 1
    longer = model(images, F.pad(tokens, (0, 9)))  # further than the context: only the captions must fit
    assert_close(longer.text_features, together.text_features)


def test_what_is_switched_off_is_none_and_changes_nothing_else(model: CoCa) -> None:
    images, tokens = pixels(model, 2), captions(model, [4, 24])
    both = model(images, tokens)
    contrastive, captioning = model(images, tokens, needs=CONTRASTIVE), model(images, tokens, needs=CAPTION)
    assert contrastive.hidden is contrastive.labels is contrastive.vocabulary is None
    assert captioning.image_features is captioning.text_features is None
    assert_close(contrastive.image_features, both.image_features)
    assert_close(contrastive.text_features, both.text_features)
    assert_close(captioning.logits, both.logits)
    with pytest.raises(ValueError, match="captioning"):
        _ = contrastive.logits


@pytest.mark.parametrize("lengths", [[1, 1], [1, 3]], ids=["all-empty", "one-empty"])
def test_captions_of_a_single_token_predict_nothing(model: CoCa, lengths: list[int]) -> None:
    tokens = captions(model, lengths)
    out = model(pixels(model, 2), tokens)
    assert out.labels.tolist() == tokens[1, 1 : lengths[1]].tolist()
    loss = losses(out)
    loss.backward()
    assert loss.isfinite()


# ---------------------------------------------------------------- the CLS mask and the id that is also padding


@pytest.mark.parametrize(("length", "seen"), [(7, 8), (75, 76), (76, 77)])
def test_keys_that_a_legacy_cls_sees(length: int, seen: int) -> None:
    lengths = torch.tensor([3, length])
    is_cls = torch.arange(min(length + 1, 76) + 1) == (lengths[:, None] + 1).clamp(max=76)  # (2, L)
    mask = legacy_attention_mask(is_cls, lengths == 76)  # (2, 1, L, L)
    assert mask[1, 0, -1].nonzero()[:, 0].tolist() == [*range(seen)]
    tokens = ~is_cls[1]
    assert torch.equal(mask[1, 0][tokens], torch.ones_like(mask[1, 0]).tril()[tokens])


def test_legacy_cls_sees_the_first_pad_only_and_correct_cls_sees_none(tiny_model: Build) -> None:
    for kind, changes in [("correct", [False, False]), ("legacy", [True, False])]:
        model = tiny_model(cls_mask=kind)
        tokens = captions(model, [6])
        for place, expected in zip((6, 7), changes, strict=True):
            other = tokens.clone()
            other[0, place] = 9
            lengths = torch.tensor([6])
            difference = model.encode_text(tokens, lengths) - model.encode_text(other, lengths)
            assert (difference.abs().max() > 1e-6) == expected, (kind, place)


@pytest.mark.parametrize("cls_mask", CLS_MASKS)
def test_the_pad_id_inside_a_text_is_a_token(tiny_model: Build, cls_mask: ClsMask) -> None:
    """CLIP's id 0 is padding after a text and "!" within one."""
    model = tiny_model(
        tokenizer="clip", text_width=32, text_heads=2, text_layers=1, decoder_layers=1, cls_mask=cls_mask
    )
    tokens = model.tokenizer(["!#$"])
    assert tokens[0, :6].tolist() == [49406, 0, 2, 259, 49407, 0]
    images = pixels(model, 1)
    out, other = model(images, tokens), model(images, tokens + 5 * (torch.arange(24) == 1))
    assert out.labels.tolist() == [0, 2, 259, 49407]
    assert (out.text_features - other.text_features).abs().max() > 1e-5
    assert (out.logits - other.logits)[1:].abs().amax(dim=1).min() > 1e-5


@pytest.mark.parametrize(
    "tower",
    [
        {"cls_mask": "legacy"},
        *({"text_tower": name, "text_width": 96, "text_layers": 1, "decoder_layers": 1} for name in TEXT_TOWERS),
    ],
    ids=["legacy", *TEXT_TOWERS],
)
@pytest.mark.parametrize("tokenizer", ["clip", "r50k"])
def test_pads_are_the_tokenizers_however_long_the_rows_are(
    tiny_model: Build, tokenizer: str, tower: dict[str, Any]
) -> None:
    model = tiny_model(tokenizer=tokenizer, embed_dim=96, **tower)
    padded = model.tokenizer(["a dog"])  # to the context length
    length = torch.tensor([len(model.tokenizer.encode("a dog"))])
    assert_close(model.encode_text(padded[:, : int(length)], length), model.encode_text(padded, length))


# ---------------------------------------------------------------- encoders, initial values, numbers


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoders_of_timm_work_end_to_end(tiny_model: Build, encoder: str) -> None:
    model = tiny_model(image_encoder=encoder, image_encoder_args=ENCODERS[encoder], image_size=64)
    images, tokens = pixels(model, 2), captions(model, [4, 6])
    features = model.image_encoder(images)
    assert features.shape[0] == 2
    assert features.shape[2] == model.image_encoder.width
    losses(model(images, tokens)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # a parameter without gradient stops training on several ranks
        assert parameter.grad.isfinite().all(), name
    assert model.generate(images, max_length=5).shape == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "pooler"),
    [("tf_efficientnet_lite0", "cascade"), *(("vit_base_patch32_clip_224", pooler) for pooler in POOLERS)],
)
def test_init_leaves_nothing_as_it_was(tiny_model: Build, encoder: str, pooler: str) -> None:
    model = tiny_model(image_encoder=encoder, image_encoder_args=ENCODERS[encoder], image_size=64, pooler=pooler)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    model.init_parameters()
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
    assert model.decoder.vocabulary.weight.std() > 0


def test_initial_deviations_are_those_of_clip() -> None:
    """openai/CLIP's `initialize_parameters`: width^-0.5 into attention, (2 width)^-0.5 into the MLP, width^-0.5
    (2 blocks)^-0.5 out of both. Self and cross blocks of the decoder are one tower of twice its layers.
    """
    torch.manual_seed(0)
    width, text_layers, layers = 128, 2, 3
    model = create_model("coca_tiny", text_width=width, text_heads=2, text_layers=text_layers, decoder_layers=layers)
    towers = {
        2 * text_layers: model.text.blocks,
        2 * 2 * layers: [*model.decoder.self_blocks, *model.decoder.cross_blocks],
    }
    for branches, blocks in towers.items():
        for block in blocks:
            parts = dict(block.named_modules())
            expected = dict.fromkeys(("attention.out", "mlp.2"), (width * branches) ** -0.5)
            expected |= {"mlp.0": (2 * width) ** -0.5}
            for name in ("attention.qkv", "attention.q", "attention.kv"):  # keys and values of the width of the image
                expected |= {name: parts[name].in_features ** -0.5} if name in parts else {}
            for name, std in expected.items():
                assert parts[name].weight.std().item() == pytest.approx(std, rel=0.03), name
                assert not parts[name].bias.any()
    assert model.decoder.vocabulary.weight.std().item() == pytest.approx(width**-0.5, rel=0.03)
    assert model.text.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.text.position_embedding.std().item() == pytest.approx(0.01, rel=0.1)


def test_uint8_pixels_equal_normalised_floats(tiny_model: Build) -> None:
    model = tiny_model(image_encoder="vit_base_patch32_clip_224", image_encoder_args=TINY_VIT)
    images = pixels(model, 2)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # openai/CLIP
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    assert_close(model.encode_image(images), model.encode_image((images / 255 - mean) / std))
    channels_last = images.contiguous(memory_format=torch.channels_last)  # as batches come
    assert torch.equal(model.encode_image(channels_last), model.encode_image(images))


def test_bfloat16_model_runs(tiny_model: Build) -> None:
    exact, model = tiny_model(), tiny_model().to(torch.bfloat16)
    images, tokens = pixels(model, 3), captions(model, [4, 24, 9])
    out = model(images, tokens)
    assert out.image_features.dtype == out.text_features.dtype == out.hidden.dtype == torch.bfloat16
    losses(out).backward()
    expected = exact(images, tokens)
    assert F.cosine_similarity(out.image_features.float(), expected.image_features).min() > 0.98
    assert F.cosine_similarity(out.text_features.float(), expected.text_features).min() > 0.98
    assert losses(out).item() == pytest.approx(losses(expected).item(), rel=0.02)
    assert model.generate(images).shape == (3, 24)


@pytest.mark.parametrize(("kind", "runs"), [("none", 4), ("cross_attention", 5), ("blocks", 8)])
def test_grad_checkpointing_runs_blocks_twice_and_gives_the_same_gradients(
    tiny_model: Build, kind: GradCheckpointing, runs: int
) -> None:
    vit = {"image_encoder": "vit_base_patch32_clip_224", "image_encoder_args": TINY_VIT}
    plain, model = tiny_model(**vit).train(), tiny_model(**vit).train()
    model.set_grad_checkpointing(kind)
    calls = []
    decoder = model.decoder
    for block in (
        model.image_encoder.trunk.blocks[0],
        model.text.blocks[0],
        decoder.self_blocks[0],
        decoder.cross_blocks[0],
    ):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    images, tokens = pixels(model, 2), captions(model, [4, 9])
    losses(plain(images, tokens)).backward()
    losses(model(images, tokens)).backward()
    assert len(calls) == runs
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_clamp_keeps_the_temperature_in_range(tiny_model: Build) -> None:
    model = tiny_model()
    for value, scale in [(9.0, 100.0), (-1.0, 1.0)]:
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.exp().item() == pytest.approx(scale)


# ---------------------------------------------------------------- freezing


def test_frozen_encoder_keeps_its_batch_norm_statistics(tiny_model: Build) -> None:
    model = tiny_model(image_encoder="tf_efficientnet_lite0", image_encoder_args={}, image_size=64)
    names = model.freeze("image_encoder")
    assert names == [n for n, p in model.named_parameters() if not p.requires_grad]
    assert all(name.startswith("image_encoder.") for name in names)
    model.train()
    statistics = {n: b.clone() for n, b in model.image_encoder.named_buffers()}
    losses(model(pixels(model, 2), captions(model, [4, 4]))).backward()
    model.generate(pixels(model, 1), max_length=4)
    assert all(torch.equal(b, statistics[n]) for n, b in model.image_encoder.named_buffers())
    assert all(p.grad is None for p in model.image_encoder.parameters())
    assert not any(m.training for m in model.image_encoder.modules())
    assert model.text.training
    assert model.decoder.training


FIRST_STAGES = {
    "resnet10t": ("image_encoder.trunk.conv1", "image_encoder.trunk.bn1", "image_encoder.trunk.layer[12]"),
    "tf_efficientnet_lite0": (
        "image_encoder.trunk.conv_stem",
        "image_encoder.trunk.bn1",
        "image_encoder.trunk.blocks.[0-4]",
    ),
}


@pytest.mark.parametrize("encoder", FIRST_STAGES)
def test_frozen_stages_are_computed_once_and_the_others_are_trained(tiny_model: Build, encoder: str) -> None:
    model = tiny_model(image_encoder=encoder, image_encoder_args={}, image_size=64)
    frozen = set(model.freeze(*FIRST_STAGES[encoder]))
    model.train()
    images, texts = pixels(model, 2), captions(model, [4, 4])
    model.image_encoder.eval()
    expected = model.image_encoder(images)
    beginning = model.image_encoder.frozen_part()
    assert {f"image_encoder.{name}" for name, _ in model.image_encoder.named_parameters()} > frozen
    assert len(list(beginning.parameters())) == len(frozen)
    kept = beginning(images)
    assert kept.shape[2] < expected.shape[2]
    torch.testing.assert_close(model.image_encoder(kept), expected)
    model.train()
    losses(model(kept, texts)).backward()
    trained = {name for name, p in model.image_encoder.named_parameters() if p.grad is not None}
    assert {f"image_encoder.{name}" for name in trained}.isdisjoint(frozen)
    assert len(trained) + len(frozen) == len(list(model.image_encoder.parameters()))


@pytest.mark.parametrize("pooler", ["cascade", *slow(*(p for p in POOLERS if p != "cascade"))])
@pytest.mark.parametrize("unused", ["contrastive", "caption"])
def test_parameters_of_a_loss_are_those_without_gradient_when_it_is_off(
    tiny_model: Build, pooler: str, unused: str
) -> None:
    model = tiny_model(pooler=pooler)
    captioning = unused == "contrastive"
    needs, left_out = (CAPTION, CONTRASTIVE) if captioning else (CONTRASTIVE, CAPTION)
    out = model(pixels(model, 2), captions(model, [4, 6]), needs=needs)
    if captioning:
        caption_loss(out.hidden, out.vocabulary, out.labels).backward()
    else:
        contrastive_loss(out.image_features, out.text_features, out.logit_scale).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    trained = model.parts_for(needs)
    assert model.freeze(*(part for part in model.parts_for(left_out) if part not in trained)) == without


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_encoder": "vit_base_patch32_clip_225"}, "patch32_clip_225'.* vit_base_patch32_clip_224"),
        ({"cls_mask": "right"}, "cls_mask.*'right'"),
        ({"text_tower_args": {"pool": "mean"}}, "text_tower_args.*mean"),
        ({"pooler_queries": 1}, "pooler_queries.*2"),
        ({"pooler_heads": 5}, "width.*heads"),
        ({"context_length": 2}, "context_length.*2"),
        ({"image_encoder_args": {"act_layer": torch.nn.SiLU}}, "image_encoder_args.*SiLU"),
        ({"image_encoder_args": {"pretrained": True}}, r"image_encoder_args\.pretrained"),
        ({"decoder_args": {"init_depth": [torch.tensor(1)]}}, "decoder_args.*tensor"),
        ({"decoder_args": {"init_depth": 0}}, "init_depth.*0"),
        ({"decoder_args": {"init_dept": 3}}, r"'decoder_args\.init_dept'.*'init_depth'"),
        ({"dropout": float("nan")}, "dropout.*nan"),
        ({"poler": "single"}, "'poler'.*'pooler'"),
    ],
)
def test_wrong_arguments(tiny_model: Build, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_sizes_are_whole_numbers(tiny_model: Build, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}.*{value!r}"):
        tiny_model(**{name: value})


@pytest.mark.parametrize(
    ("images", "tokens", "message"),
    [
        ((2, 1, 32, 32), (2, 5), r"\(2, 1, 32, 32\)"),
        ((3, 32, 32), (3, 5), r"\(3, 32, 32\)"),
        ((1, 3, 32, 32), (2, 5), "1 images and 2 texts"),
        ((2, 3, 32, 32), (2, 25), "25.*24"),
    ],
)
def test_wrong_shapes(tiny_model: Build, images: tuple[int, ...], tokens: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.zeros(images), torch.full(tokens, 5))


def test_siglip_starts_with_its_own_temperature_and_bias() -> None:
    """t' = log 10, b = -10 (Zhai et al. 2023, section 3.2)."""
    model = create_model("coca_tiny", contrastive="siglip")
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert model.logit_bias.item() == -10
    assert "logit_bias" in model.parts_for(CONTRASTIVE)
    assert CoCa(model.config).logit_bias is not None

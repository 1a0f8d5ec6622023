"""CoCa2 for images of any shape computes what a second implementation computes from the same file, image by image and
without padding.
"""

from pathlib import Path
from typing import Any

import naflex_oracle
import pytest
import torch
from torch import Tensor

from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, create_model
from coca_lit.models.cost import forward_flops
from coca_lit.models.inputs import stack_images
from coca_lit.projects.naflex.inputs import Patches
from coca_lit.training.optim import AdamW
from coca_lit.weights.computation import merge
from coca_lit.weights.open_clip import from_open_clip, to_open_clip
from coca_lit.weights.open_clip.config import open_clip_config
from helpers import open_clip_4, oracle
from helpers.family import check_files
from helpers.open_clip_4 import same
from helpers.oracle import State

NAME = "coca2-moderntext-naflex_ViT-B-32"
STYLE = {"gated": True, "qk_norm": True, "mlp_width": 44}
SMALL: dict[str, Any] = open_clip_4.SMALL | {
    "image_encoder_args": open_clip_4.SMALL["image_encoder_args"] | {"pre_norm": True, "pos_embed_grid_size": [3, 3]},
    "image_size": 24,
    "decoder_layers": 2,
    "text_tower_args": {"pool": "mean", **STYLE},
    "decoder_args": {"cross_attention_every": 1, **STYLE},
}
TEXTS = ["a dog", "Two cats sit on a very long wooden bench! Indeed they do", "hat !", ""]
SHAPES = [(24, 24), (8, 64), (32, 16), (8, 8)]  # 9, 8, 8 and 1 patches


def make(**overrides: Any) -> tuple[CoCa, State, State]:
    """A model, its OpenCLIP file with every tensor random, and that in float64."""
    template = create_model(NAME, **SMALL | overrides)
    state = oracle.random_state({name: tuple(tensor.shape) for name, tensor in to_open_clip(template).items()})
    model = from_open_clip(state, open_clip_config(template, "4")).eval()
    assert model.config == template.config
    return model, state, {name: t.double() for name, t in state.items()}


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *shape, generator=generator) for shape in SHAPES]


@pytest.fixture(scope="module")
def model() -> CoCa:
    return make()[0]


def batch_of(images: list[Tensor]) -> Patches:
    return stack_images([Patches.of(image, 8) for image in images])


@pytest.mark.parametrize("kind", ["cascade", "parallel"])
@pytest.mark.parametrize("width", [48, 32], ids=["of two widths", "of one width"])
@torch.no_grad()
def test_it_equals_the_oracle(images: list[Tensor], kind: str, width: int) -> None:
    encoder = SMALL["image_encoder_args"] | {"embed_dim": width, "num_heads": 1}
    model, state, s = make(pooler=f"masked_{kind}", image_encoder_args=encoder)
    assert state["pool_norm.weight"].shape == (width,)
    tokens = model.tokenizer(TEXTS)
    out = model(batch_of(images), tokens)
    logits = []
    for i, (image, ids) in enumerate(zip(images, tokens.tolist(), strict=True)):
        found = naflex_oracle.tokens(s, image.double(), 1)
        vector, context = oracle.two_poolers(s, found, kind, 4, norm="pool_norm", where="")
        assert context.shape == (5, 32)
        same(out.image_features[i], oracle.unit(vector))
        ids = ids[: ids.index(50257) + 1]
        feature, states = oracle.modern_text(s, ids, 2, "mean")
        same(out.text_features[i], oracle.unit(feature))
        logits.append(oracle.modern_decoder(s, states[:-1], context, 2))
    same(out.logits, torch.cat(logits))
    again = to_open_clip(model)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@torch.no_grad()
def test_padding_changes_nothing(images: list[Tensor], precision: torch.dtype | None) -> None:
    """Neither features nor logits, whatever the rows of the padding hold; also in half precision, where no row may be
    without a key.
    """
    model, batch = make()[0], batch_of(images)
    if precision is None:
        model.double()
    tokens = model.tokenizer(TEXTS)
    longer = Patches(torch.nn.functional.pad(batch.rows, (0, 0, 0, 7), value=300.0), batch.grids)
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        outs = [model(patches, tokens) for patches in (batch, longer)]
        alone = [model(batch_of([image]), tokens[i : i + 1]) for i, image in enumerate(images)]
    tolerance = 1e-9 if precision is None else 0.02  # bf16 keeps 8 bits, and each processor sums in an order of its own
    for other in (outs[1], alone):
        parts = [other] if other is outs[1] else other
        for name in ("image_features", "text_features", "logits"):
            expected = torch.cat([getattr(part, name) for part in parts])
            assert expected.isfinite().all()
            difference = getattr(outs[0], name) - expected
            assert difference.norm() <= tolerance * expected.norm()


@torch.no_grad()
def test_images_of_one_shape_equal_the_path_of_timm(model: CoCa) -> None:
    """A batch of pixels, uint8 or normalised, becomes what timm's own encoder makes of it."""
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    encoder = model.image_encoder
    dense = encoder.trunk.forward_features(encoder.normalise(pixels))[:, 4:]
    square = encoder(pixels)
    torch.testing.assert_close(square.rows, dense, atol=1e-5, rtol=1e-5)
    patches = stack_images([Patches.of(image, 8) for image in pixels])
    assert torch.equal(encoder(patches).rows, square.rows)
    torch.testing.assert_close(encoder(encoder.normalise(pixels)).rows, square.rows, atol=1e-5, rtol=1e-5)
    assert encoder(square) is square
    with pytest.raises(ValueError, match=r"8 .*20 x 24"):
        model.encode_image(torch.zeros(1, 3, 20, 24))


def test_all_parameters_train(images: list[Tensor], model: CoCa) -> None:
    """Gradients are finite and reach everything; recomputing the blocks gives the same ones."""
    tokens, found = model.tokenizer(TEXTS), []
    for recompute in ("none", "blocks"):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        model.train()
        sum(loss_terms(model(batch_of(images), tokens)).values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found)
    model.zero_grad(set_to_none=True)
    model.eval().set_grad_checkpointing("none")


def test_the_norm_before_the_blocks_is_as_deep_as_the_embeddings(model: CoCa) -> None:
    names = [name for name, _ in model.image_encoder.named_parameters()]
    expected = {
        name: 2 if ".blocks.0." in name else 1 if ".blocks.1." in name else 3 for name in names
    }  # the encoder has no final norm
    assert "trunk.norm_pre.weight" in names
    assert model.image_encoder.depths() == expected


def test_what_timm_lists_does_not_decay(model: CoCa) -> None:
    """The register tokens, whose names are not those of a plain encoder."""
    decays = {id(p): group["weight_decay"] for group in AdamW(lr=1e-3)(model).param_groups for p in group["params"]}
    found = {name.removeprefix("trunk.embeds."): decays[id(p)] for name, p in model.image_encoder.named_parameters()}
    assert (found["reg_token"], found["pos_embed"], found["proj.weight"]) == (0.0, 0.0, 0.2)


@torch.no_grad()
def test_captions_do_not_depend_on_the_other_images(images: list[Tensor], model: CoCa) -> None:
    """With a cache, greedy and by beams, with attention that adds up to 1."""
    together = model.generate(batch_of(images), strategy="beam", num_beams=2, max_length=9)
    for i, image in enumerate(images):
        alone = model.generate(batch_of([image]), strategy="beam", num_beams=2, max_length=9)
        width = alone.shape[1]
        assert torch.equal(together[i, :width], alone[0])
    greedy = model.generate(batch_of(images), max_length=7, return_attention=True)
    torch.testing.assert_close(greedy.attention[:, 1].sum(-1), torch.ones(4))
    seen = model.pooling.attention(model.image_encoder(batch_of(images)))
    torch.testing.assert_close(seen.sum(-1), torch.ones(4, 5))
    assert seen[3, :, 1:].abs().max() == 0
    likelihood = model.log_likelihood(batch_of(images), model.tokenizer(TEXTS))
    assert likelihood.shape == (4,)


def test_files_go_both_ways(tmp_path: Path) -> None:
    encoder = SMALL["image_encoder_args"] | {"max_patches": 12}
    model, _, _ = make(image_encoder_args=encoder)
    check_files(model, tmp_path)
    assert model.preprocessing["input_kind"].max_patches == 12
    with pytest.raises(ValueError, match="format=onnx"):
        pytest.importorskip("coca_lit.tools.export.onnx").write_onnx(model, tmp_path)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("text_cfg", "tokenizer_kwargs", {"clean": "lower"}, "asks for text_cfg.tokenizer_kwargs = "),
        ("vision_cfg", "timm_model_name", "naflexvit_so150m2_patch16_reg1_gap", "asks for vision_cfg.timm_model_name"),
        ("vision_cfg", "timm_model_kwargs", {"patch_size": 16}, "kwargs.patch_size is 16, and the tensors show 8"),
        ("vision_cfg", "timm_model_kwargs", {"pos_embed_ar_preserving": True}, "kwargs.pos_embed_ar_preserving, which"),
    ],
)
def test_a_config_that_asks_for_something_else(section: str, key: str, value: Any, message: str) -> None:
    model, state, _ = make()
    config = open_clip_config(model, "4")
    config["model_cfg"][section][key] = value
    with pytest.raises(ValueError, match=message):
        from_open_clip(state, config)


@pytest.mark.parametrize("named", ["masked_cascade", "coca_lit.models.poolers:masked_cascade"])
def test_weights_may_name_the_pooler_in_any_way(named: str) -> None:
    assert merge({"pooler": "masked_cascade"}, {}, {"pooler": named}, "x.ckpt") == {"pooler": "masked_cascade"}
    with pytest.raises(ValueError, match=r"pooler is .*masked_parallel"):
        merge({"pooler": "masked_parallel"}, {}, {"pooler": named}, "x.ckpt")


def test_the_preset_is_that_of_open_clip() -> None:
    with torch.device("meta"):
        model = create_model(NAME)
    assert sum(p.numel() for p in model.parameters()) == 264_632_321
    assert sum(p.numel() for p in model.image_encoder.parameters()) == 87_485_952
    assert len(to_open_clip(model)) == 503
    config = open_clip_config(model, "4")["model_cfg"]
    assert config["vision_cfg"] == {
        "timm_model_name": "naflexvit_base_patch16_gap",
        "timm_model_kwargs": {"patch_size": 32, "pre_norm": True, "pos_embed_grid_size": [8, 8]},
        "timm_pool": "avg",
        "timm_proj": "linear",
        "output_tokens": True,
        "image_size": 256,
        "image_seq_len": 64,
        "attentional_pool": "parallel",
        "attn_pooler_queries": 128,
        "attn_pooler_heads": 8,
    }
    assert config["text_cfg"]["tokenizer_kwargs"] == {"clean": "whitespace"}


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = create_model(NAME, **SMALL | {"embed_dim": 64, "text_width": 64, "pooler_queries": 64})
    assert model.pooling.generative.query.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert model.image_encoder.trunk.blocks[0].ls1.gamma.unique().tolist() == [pytest.approx(1e-5)]


def test_flops_are_of_as_many_patches_as_an_image_may_have() -> None:
    """Also where no square has as many, or the image size is no multiple of a patch."""
    arguments = SMALL["image_encoder_args"]
    few, many = (create_model(NAME, **SMALL | {"image_encoder_args": arguments | {"max_patches": n}}) for n in (9, 18))
    assert forward_flops(many) > forward_flops(few)
    assert forward_flops(create_model(NAME, **SMALL | {"image_size": 28})) == forward_flops(few)


def test_what_the_config_does_not_say_of_the_encoder_is_not_exported() -> None:
    arguments = SMALL["image_encoder_args"] | {"pos_embed_ar_preserving": True}
    with pytest.raises(ValueError, match="pos_embed_ar_preserving"):
        open_clip_config(create_model(NAME, **SMALL | {"image_encoder_args": arguments}), "4")

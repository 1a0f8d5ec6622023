"""CoCa2 with OpenCLIP 4's modern text side computes what a second implementation computes from the same file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from coca_lit.lit_module import CoCaLit
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, create_model
from coca_lit.models.coca import CAPTION
from coca_lit.models.trainable import GradCheckpointing
from coca_lit.projects.coca2.blocks import rotary_table, rotate
from coca_lit.training.optim import AdamW
from coca_lit.weights.load import load_dual_encoder, load_model
from coca_lit.weights.open_clip import from_open_clip, to_open_clip
from coca_lit.weights.open_clip.config import open_clip_config
from helpers import oracle
from helpers.family import check_cached_generation, check_files, check_packed_training
from helpers.open_clip_4 import SMALL, TEXTS, make, same
from helpers.oracle import State
from helpers.slow import slow

STYLE = {"gated": True, "qk_norm": True, "mlp_width": 44}
MODERN: dict[str, Any] = {
    "text_tower": "modern",
    "text_tower_args": {"pool": "eos", **STYLE},
    "decoder_args": {"cross_attention_every": 2, **STYLE},
}
PLAIN: dict[str, Any] = {"text_tower": "modern", "text_tower_args": {"gated": False}, "decoder_args": {"gated": False}}


def modern(**overrides: Any) -> tuple[CoCa, State, State]:
    return make(**MODERN | overrides)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(len(TEXTS), 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("overrides", "pool", "ratio", "base"),
    [
        (MODERN, "eos", 2, 10000.0),
        *slow(
            (MODERN | {"text_tower_args": {"pool": "mean", **STYLE}}, "mean", 2, 10000.0),
            (MODERN | {"text_tower_args": {"pool": "map", **STYLE}}, "map", 2, 10000.0),
            (PLAIN, "eos", 1, 10000.0),
            (MODERN | {"decoder_layers": 5, "decoder_args": {"cross_attention_every": 4, **STYLE}}, "eos", 4, 10000.0),
        ),
        ({**PLAIN, "text_tower_args": {"rope_base": 50.0}, "decoder_args": {"rope_base": 50.0}}, "eos", 1, 50.0),
    ],
    ids=["eos", "mean", "map", "without gates and norms of heads", "few cross-attentions", "another base"],
)
@torch.no_grad()
def test_modern_text_equals_the_oracle(
    images: Tensor, overrides: dict[str, Any], pool: str, ratio: int, base: float
) -> None:
    model, state, s = make(**overrides)
    assert model.config.text_tower_args["pool"] == pool
    tokens = model.tokenizer(TEXTS)
    out = model(images, tokens)
    logits = []
    for i, (image, ids) in enumerate(zip(images.double(), tokens.tolist(), strict=True)):
        _, context = oracle.two_poolers(s, oracle.vision_tokens(s, image, 3), "cascade", 4)
        ids = ids[: ids.index(49407) + 1]
        feature, states = oracle.modern_text(s, ids, 2, pool, base=base)
        same(out.text_features[i], oracle.unit(feature))
        logits.append(oracle.modern_decoder(s, states[:-1], context, 2, ratio, base))
    same(out.logits, torch.cat(logits))
    again = to_open_clip(model)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@torch.no_grad()
def test_a_text_without_an_end_is_pooled_at_its_last_token() -> None:
    model, _, s = modern()
    ids = [49406, 320, 1929]
    feature, _ = oracle.modern_text(s, ids, 2, "eos")
    same(model.encode_text(torch.tensor([[*ids, 0, 0]]))[0], oracle.unit(feature))


def test_rotation_is_of_neighbouring_channels() -> None:
    """By hand: at position 3 the first pair of a head of 4 turns by 3 and the second by 3 / 100."""
    x = torch.randn(1, 2, 4, dtype=torch.float64)
    turned = rotate(x, rotary_table(torch.tensor([3]), 4, 10000.0))
    for head in range(2):
        for pair, angle in enumerate((3.0, 0.03)):
            z = torch.view_as_complex(x[0, head, 2 * pair : 2 * pair + 2]) * torch.exp(torch.tensor(1j * angle))
            found = torch.view_as_complex(turned[0, head, 2 * pair : 2 * pair + 2].contiguous())
            torch.testing.assert_close(found, z, atol=1e-6, rtol=0)


TINY = {
    "coca_tiny": {"text_tower": "modern", "text_tower_args": {"qk_norm": True, "pool": "map"}, "decoder_args": None},
    "ratio": {
        "text_tower": "modern",
        "text_tower_args": {"pool": "mean"},
        "decoder_args": {"qk_norm": True, "cross_attention_every": 2},
        "decoder_layers": 5,
    },
}


@pytest.mark.parametrize("name", [*slow("coca_tiny"), "ratio"])
def test_packed_training_equals_padded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a packed text keep their positions: features, losses and gradients are equal."""
    torch.manual_seed(0)
    model = create_model("coca_tiny", pooler="openclip_cascade", **TINY[name]).double().train()
    check_packed_training(model, monkeypatch)


@pytest.mark.parametrize("name", [*slow("coca_tiny"), "ratio"])
@torch.no_grad()
def test_cached_generation_equals_the_whole_pass(name: str) -> None:
    """The log-probabilities of beams are those of the whole pass."""
    torch.manual_seed(0)
    model = create_model("coca_tiny", pooler="openclip_parallel", **TINY[name]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    check_cached_generation(model, pixels)
    attention = model.generate(pixels, max_length=8, return_attention=True).attention
    torch.testing.assert_close(attention[:, 1].sum(-1), torch.ones(3))


@pytest.mark.parametrize(
    ("setting", "expected"), [("none", [1, 1, 1]), ("blocks", [2, 2, 2]), ("cross_attention", [2, 1, 2])]
)
def test_blocks_of_the_decoder_run_again_when_asked_to(setting: GradCheckpointing, expected: list[int]) -> None:
    """Every second of three looks at the image. In evaluation nothing runs again."""
    sizes = {"text_tower": "modern", "decoder_layers": 3, "decoder_args": {"cross_attention_every": 2}}
    model = create_model("coca_tiny", pooler="openclip_cascade", **sizes)
    model.set_grad_checkpointing(setting)
    counts = [0, 0, 0]

    def count(block: int) -> None:
        counts[block] += 1

    for i, block in enumerate(model.decoder.blocks):
        block.attn.register_forward_pre_hook(lambda *_, i=i: count(i))
    tokens = torch.randint(4, 40, (2, 6))
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for training, runs in ((True, expected), (False, [1, 1, 1])):
        model.train(training)
        counts[:] = [0, 0, 0]
        sum(loss_terms(model(pixels, tokens, torch.tensor([6, 6]))).values()).backward()
        assert counts == runs


def test_the_caption_loss_alone_freezes_the_pool() -> None:
    """Everything that is trained gets a gradient, and nothing else."""
    model = create_model("coca_tiny", pooler="openclip_cascade", **TINY["coca_tiny"])
    CoCaLit(model, AdamW(lr=1e-3), contrastive_weight=0.0)
    tokens = torch.randint(4, 40, (2, 6))
    out = model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), tokens, torch.tensor([6, 6]), needs=CAPTION)
    loss_terms(out)["caption"].backward()
    assert not any(p.requires_grad for p in model.text.pool.parameters())
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_files_go_both_ways(tmp_path: Path) -> None:
    model, _, _ = modern(text_tower_args={"pool": "mean", **STYLE, "norm_eps": 1e-5, "rope_base": 500.0})
    check_files(model, tmp_path)


def test_a_file_without_a_decoder_is_no_clip(tmp_path: Path) -> None:
    model, _, _ = modern(decoder_layers=0)
    save_file(to_open_clip(model), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(open_clip_config(model, "4")))
    for load in (load_model, load_dual_encoder):
        loaded = load(tmp_path / "open_clip_model.safetensors")
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_a_config_that_asks_for_another_modern_tower() -> None:
    model, state, _ = modern()
    for key, value in (("reg_tokens", 4), ("value_residual", True), ("mlp_type", "relu2"), ("attention_bias", True)):
        config = open_clip_config(model, "4")
        config["model_cfg"]["text_cfg"][key] = value
        with pytest.raises(ValueError, match=f"asks for text_cfg.{key} = "):
            from_open_clip(state, config)


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = create_model("coca2-moderntext_ViT-B-32", **SMALL | {"text_width": 64, "embed_dim": 64, "text_layers": 4})
    block = model.text.blocks[1]
    for tensor, std in (
        (block.attn.qkv.weight, 1 / 8),
        (block.attn.gate.weight, 1 / 8),
        (block.attn.proj.weight, 8**-1.5),
        (block.mlp.w12.weight, 1.22 * 128**-0.5),
        (block.mlp.w3.weight, 8**-1.5),
    ):
        assert tensor.std().item() == pytest.approx(std if std != 8**-1.5 else 64**-0.5 * 8**-0.5, rel=0.05)

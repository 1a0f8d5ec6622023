"""OpenCLIP 4's captioners compute what a second implementation computes from the same file, and files go both ways."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coca_lit.models import create_model
from coca_lit.tools.export.open_clip import write_open_clip
from coca_lit.weights.open_clip import from_open_clip, to_open_clip
from coca_lit.weights.open_clip.config import open_clip_config
from helpers import oracle
from helpers.family import check_files
from helpers.open_clip_4 import HEADS, SMALL, TEXTS, make, same


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(len(TEXTS), 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["cascade", "parallel"])
@pytest.mark.parametrize("width", [32, 48], ids=["of one width", "of two widths"])
@torch.no_grad()
def test_two_poolers_equal_the_oracle(images: Tensor, kind: str, width: int) -> None:
    """ln_post has the width of the trunk and comes first, no norm follows a pooler, the decoder reads all tokens."""
    image_args = {"image_encoder_args": SMALL["image_encoder_args"] | {"embed_dim": width, "num_heads": 1}}
    model, state, s = make(pooler=f"openclip_{kind}", **image_args)
    assert model.config.pooler == f"openclip_{kind}"
    packed = {name for name in state if name.startswith("visual.attn_pool") and name.endswith("in_proj_weight")}
    contrastive = "visual.attn_pool_contrastive.attn.in_proj_weight"
    assert (contrastive in packed) == (kind == "cascade" or width == 32)
    assert ("visual.attn_pool.attn.in_proj_weight" in packed) == (width == 32)
    assert state["visual.ln_post.weight"].shape == (width,)
    tokens = model.tokenizer(TEXTS)
    out = model(images, tokens)
    logits = []
    for i, (image, ids) in enumerate(zip(images.double(), tokens.tolist(), strict=True)):
        vector, context = oracle.two_poolers(s, oracle.vision_tokens(s, image, 1), kind, HEADS["pooler"])
        assert context.shape == (5, 32)
        same(out.image_features[i], oracle.unit(vector))
        length = ids.index(49407) + 1
        valid = [j < length for j in range(len(ids))]
        feature, states = oracle.classic_text(s, ids, HEADS["text"], correct=True, valid=valid)
        same(out.text_features[i], oracle.unit(feature))
        logits.append(oracle.classic_decoder(s, states[: length - 1], context, HEADS["text"]))
    same(out.logits, torch.cat(logits))


@torch.no_grad()
def test_the_correct_mask_of_a_text_by_hand(images: Tensor) -> None:
    """CLS sees the tokens of its text and itself. With the other mask the same weights give other features."""
    model, state, s = make()
    ids = model.tokenizer(TEXTS[2])[0].tolist()
    length = ids.index(49407) + 1
    tokens = torch.tensor([ids])
    correct, _ = oracle.classic_text(s, ids, HEADS["text"], correct=True)
    same(model.encode_text(tokens)[0], oracle.unit(correct))
    config = open_clip_config(model, "4")
    assert config["model_cfg"]["text_cfg"]["correct_cls_mask"] is True
    config["model_cfg"]["text_cfg"]["correct_cls_mask"] = False
    legacy = from_open_clip(state, config).eval()
    wrong, _ = oracle.classic_text(s, ids, HEADS["text"], correct=False)
    same(legacy.encode_text(tokens)[0], oracle.unit(wrong))
    assert (oracle.unit(wrong) - oracle.unit(correct)).abs().max() > 0.01
    # OpenCLIP gives CLS the position after whatever it gets; ours always has the last one, that of padded texts.
    short, _ = oracle.classic_text(s, ids[:length], HEADS["text"], correct=True)
    assert (oracle.unit(short) - oracle.unit(correct)).abs().max() > 0.01
    same(model.encode_text(tokens[:, :length])[0], oracle.unit(correct))


@torch.no_grad()
def test_id_0_within_a_text_is_a_token(images: Tensor) -> None:
    """ "!#$" is [0, 2, 259]: counted by length as OpenCLIP's text mask does, in features, logits and labels."""
    model, _, s = make()
    ids = model.tokenizer("!#$")[0].tolist()
    assert ids[1] == 0
    length = ids.index(49407) + 1
    out = model(images[:1], torch.tensor([ids]))
    valid = [j < length for j in range(len(ids))]
    as_token, _ = oracle.classic_text(s, ids, HEADS["text"], correct=True, valid=valid)
    as_pad, _ = oracle.classic_text(s, ids, HEADS["text"], correct=True)
    same(out.text_features[0], oracle.unit(as_token))
    assert (oracle.unit(as_pad) - oracle.unit(as_token)).abs().max() > 0.01
    assert out.labels.tolist() == ids[1:length]


def test_files_go_both_ways(tmp_path: Path) -> None:
    for kind in ("cascade", "parallel"):
        model, state, _ = make(pooler=f"openclip_{kind}")
        again = to_open_clip(model)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], state[name]) for name in state)
        check_files(model, tmp_path)


def test_a_file_without_a_config() -> None:
    _, state, _ = make()
    found = from_open_clip(state)
    assert (found.config.pooler, found.config.cls_mask) == ("openclip_cascade", "correct")


def test_a_mask_that_version_4_knows(tmp_path: Path) -> None:
    model, _, _ = make(pooler="single")
    write_open_clip(model, tmp_path, version="4")
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["correct_cls_mask"] is True
    assert "coca_lit" not in config
    with pytest.raises(ValueError, match="leave out correct_cls_mask=true"):
        write_open_clip(model, tmp_path, correct_cls_mask=True, version="4")
    with pytest.raises(ValueError, match=r"version.*5"):
        write_open_clip(model, tmp_path, version="5")


def test_initial_values() -> None:
    """Xavier's bound of a packed matrix is that of its three parts together; residual branches count layers once."""
    torch.manual_seed(0)
    arguments = SMALL | {"embed_dim": 64, "text_width": 64, "decoder_args": {"init_depth": 3}}
    model = create_model("coca_ViT-B-32", pooler="openclip_cascade", **arguments)
    state = to_open_clip(model)
    packed = state["visual.attn_pool_contrastive.attn.in_proj_weight"]
    assert packed.abs().max().item() == pytest.approx((6 / (4 * 64)) ** 0.5, rel=0.01)
    assert state["visual.attn_pool.attn.k_proj_weight"].abs().max().item() == pytest.approx((6 / 112) ** 0.5, rel=0.01)
    assert state["visual.attn_pool.attn.q_proj_weight"].abs().max().item() == pytest.approx((6 / 128) ** 0.5, rel=0.01)
    assert state["visual.attn_pool.query"].std().item() == pytest.approx(1, rel=0.1)
    assert state["text_decoder.resblocks.0.mlp.c_proj.weight"].std().item() == pytest.approx(
        64**-0.5 * 6**-0.5, rel=0.05
    )
    assert not state["visual.attn_pool.attn.in_proj_bias"].any()

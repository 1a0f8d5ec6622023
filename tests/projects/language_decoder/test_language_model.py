"""A GPT-2 in the decoder computes what GPT-2 does."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coca_lit.cli.module import build_module
from coca_lit.errors import ConfigError
from coca_lit.models import CoCa, create_model
from coca_lit.projects.language_decoder.gpt2 import start_decoder
from coca_lit.weights.load import load_model, save_model
from helpers.running import compose

WIDTH, HEADS = 128, 2
SIZES: dict[str, Any] = {"text_width": WIDTH, "text_heads": HEADS, "text_layers": 1, "decoder_layers": 2}


def gpt2(layers: int = 3, vocabulary: int = 59, width: int = WIDTH, prefix: str = "transformer.") -> dict[str, Tensor]:
    """Random weights with the names and shapes of Transformers' GPT2LMHeadModel."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    state = {"wte.weight": random(vocabulary, width), "wpe.weight": random(64, width)}
    for i in range(layers):
        shapes = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
        shapes |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
        for name, (rows, columns) in shapes.items():
            state |= {f"h.{i}.{name}.weight": random(rows, columns), f"h.{i}.{name}.bias": random(columns)}
        for name in ("ln_1", "ln_2"):
            state |= {f"h.{i}.{name}.weight": 1 + random(width), f"h.{i}.{name}.bias": random(width)}
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()  # the causal mask, which older versions stored
    state |= {"ln_f.weight": 1 + random(width), "ln_f.bias": random(width)}
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def layer(state: dict[str, Tensor], i: int, x: Tensor, approximate: str) -> Tensor:
    """GPT-2's block: x + attention(ln_1 x), then x + mlp(ln_2 x), with heads of 64 and a causal mask. x (T, D)."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"transformer.h.{i}.{name}.weight"] + state[f"transformer.h.{i}.{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = (state[f"transformer.h.{i}.{name}.{kind}"] for kind in ("weight", "bias"))
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    length = len(x)
    q, k, v = (
        part.view(length, -1, 64).transpose(0, 1) for part in linear("attn.c_attn", norm("ln_1", x)).chunk(3, -1)
    )
    scores = (q @ k.transpose(1, 2) / math.sqrt(64)).masked_fill(~torch.ones(length, length).tril().bool(), -math.inf)
    x = x + linear("attn.c_proj", (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1))
    return x + linear("mlp.c_proj", F.gelu(linear("mlp.c_fc", norm("ln_2", x)), approximate=approximate))


def build(**overrides: Any) -> CoCa:
    torch.manual_seed(1)
    return create_model("coca_tiny", **SIZES | overrides).eval()


@torch.no_grad()
def test_the_decoder_computes_the_last_layers(tmp_path: Path) -> None:
    """Without images, so without cross blocks; vocabularies of one size."""
    state, model = gpt2(), build()
    cross = {name: tensor.clone() for name, tensor in model.state_dict().items() if "cross" in name}
    taken, new = start_decoder(model, state)
    x = torch.randn(1, 9, WIDTH)
    assert model.decoder is not None
    logits = model.decoder.vocabulary(model.decoder(x, None))[0]
    for approximate, tolerance in (("none", 1e-4), ("tanh", 1e-2)):
        expected = layer(state, 2, layer(state, 1, x[0], approximate), approximate)
        expected = F.layer_norm(expected, (WIDTH,), state["transformer.ln_f.weight"], state["transformer.ln_f.bias"])
        torch.testing.assert_close(logits, expected @ state["transformer.wte.weight"].T, atol=tolerance, rtol=0)
    assert torch.equal(model.text.token_embedding.weight, state["transformer.wte.weight"])
    assert all(name.startswith("decoder.cross_blocks.") for name in new)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in cross.items())
    assert set(taken) | set(new) == {n for n in model.state_dict() if n.startswith(("decoder.", "text.token_emb"))}


def test_what_does_not_fit_is_new() -> None:
    model = build(decoder_layers=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taken, new = start_decoder(model, gpt2(vocabulary=70, prefix=""))
    assert {"decoder.vocabulary.weight", "text.token_embedding.weight"} <= set(new)
    assert {name.split(".")[2] for name in taken if "self_blocks" in name} == {"1", "2", "3"}  # the upper ones
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in new)
    assert any(name.startswith("decoder.self_blocks.0.") for name in new)


@pytest.mark.parametrize(
    ("state", "overrides", "message"),
    [
        ({"a": torch.ones(1)}, {}, r"this is not a GPT-2 with Transformers' names: expected wte.weight, "),
        (
            gpt2(1),
            {"text_width": 96, "text_heads": 3},
            r"is 128 wide and the decoder 96: set \+model.net.text_width=128",
        ),
        (
            gpt2(1) | {"transformer.h.0.attn.c_attn.weight": torch.ones(3 * WIDTH, WIDTH)},
            {},
            r"h.0.attn.c_attn.weight is \(384, 128\), expected \(128, 384\)",
        ),
        (gpt2(1), {"text_heads": 4}, r"GPT-2's heads are 64 wide: set \+model.net.text_heads=2"),
        (gpt2(1), {"decoder_layers": 0}, "the model has no decoder"),
    ],
)
def test_what_cannot_start_a_decoder(state: dict[str, Tensor], overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start_decoder(build(**overrides), state)


@pytest.mark.slow
def test_as_a_key_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(gpt2(), tmp_path / "gpt2.bin")
    save_model(build(), tmp_path / "coca.safetensors")
    save_model(build(decoder_layers=0), tmp_path / "towers.safetensors")
    given = ("data=scenes", *(f"+model.net.{key}={value}" for key, value in SIZES.items()))
    given = (*given, f"init_parts.decoder={tmp_path / 'gpt2.bin'}")
    net = build_module(compose(*given)).net
    printed = capsys.readouterr().out
    assert "gpt2.bin: decoder.norm, text.token_embedding, decoder.vocabulary, decoder.self_blocks" in printed
    assert "new: decoder.cross_blocks" in printed
    wte = gpt2()["transformer.wte.weight"]
    assert torch.equal(net.text.token_embedding.weight, wte)
    net = build_module(compose(*given, f"init_from={tmp_path / 'towers.safetensors'}")).net
    tower = load_model(tmp_path / "towers.safetensors").text.token_embedding.weight
    assert torch.equal(net.text.token_embedding.weight, tower)  # on which the tower was trained
    assert torch.equal(net.decoder.vocabulary.weight, wte)
    with pytest.raises(ConfigError, match=r"init_parts\.decoder: init_from"):
        build_module(compose(*given, f"init_from={tmp_path / 'coca.safetensors'}"))

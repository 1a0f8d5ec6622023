"""A second implementation of MaMMUT, text by text, from the tensors of an OpenCLIP file in float64."""

from collections.abc import Sequence

from torch import Tensor

from helpers import oracle
from helpers.oracle import State


def image_side(s: State, tokens: Tensor, class_token: bool) -> tuple[Tensor, Tensor]:
    """Image feature (E,) and context of the decoder (S, W)."""
    tokens = tokens if class_token else tokens[1:]
    return oracle.layer_norm(s, "visual.ln_post", tokens.mean(0)) @ s["visual.proj"], tokens @ s["map_viz2txt_kv"]


def text_feature(s: State, ids: Sequence[int], heads: int) -> Tensor:
    """Text feature (W,): the mean over all of `ids`, without a causal mask."""
    x = s["text.token_embedding.weight"][list(ids)] + s["text.positional_embedding"][: len(ids)]
    for i in range(oracle.depth(s, "text.resblocks.")):
        x = oracle.residual_block(s, f"text.resblocks.{i}", x, heads)
    return oracle.layer_norm(s, "text.ln_final", x).mean(0)


def logits(s: State, ids: Sequence[int], context: Tensor, heads: int, ratio: int) -> Tensor:
    """Logits (T, V) of the caption pass."""
    x = s["text.token_embedding.weight"][list(ids)] + s["text.positional_embedding"][: len(ids)]
    for i in range(oracle.depth(s, "text.resblocks.")):
        x = oracle.residual_block(s, f"text.resblocks.{i}", x, heads, oracle.causal(len(x)))
        if i % ratio == 0:
            x = oracle.residual_block(s, f"text.cross_attn.{i // ratio}", x, heads, context=context)
    return oracle.layer_norm(s, "text.ln_final", x) @ s.get("text.lm_head", s.get("text.text_projection"))

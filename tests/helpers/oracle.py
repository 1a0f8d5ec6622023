"""OpenCLIP 4's captioners a second time: plain functions over a dict of tensors with OpenCLIP's names, in float64.

No package contains that version. The functions follow its source, share no code with coca_lit and know no batching
tricks: every text is computed alone, unpadded where OpenCLIP's result does not depend on padding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Every tensor random: norm weights around 1.3 and not 1, biases not 0."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name or "ln_" in name
        state[name] = 1.3 + 0.2 * noise if is_norm and name.endswith("weight") else 0.2 * noise
    return state


def linear(s: State, name: str, x: Tensor) -> Tensor:
    return x @ s[f"{name}.weight"].T + s.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))


def layer_norm(s: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * s[f"{name}.weight"] + s[f"{name}.bias"]


def rms_norm(s: State, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * s[f"{name}.weight"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
    """q (T, D), k, v (S, D), allowed (T, S), head after head."""
    out = []
    for part_q, part_k, part_v in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = part_q @ part_k.T / math.sqrt(part_q.shape[-1])
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        out.append(p / p.sum(-1, keepdim=True) @ part_v)
    return torch.cat(out, -1)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


# Classic parts


def multi_head(s: State, name: str, x: Tensor, context: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
    """`nn.MultiheadAttention`: one packed matrix, or three where the context has another width."""
    if f"{name}.in_proj_weight" in s:
        wq, wk, wv = s[f"{name}.in_proj_weight"].chunk(3)
    else:
        wq, wk, wv = (s[f"{name}.{part}_proj_weight"] for part in "qkv")
    bq, bk, bv = s[f"{name}.in_proj_bias"].chunk(3)
    return linear(
        s, f"{name}.out_proj", attention(x @ wq.T + bq, context @ wk.T + bk, context @ wv.T + bv, heads, allowed)
    )


def residual_block(
    s: State, name: str, x: Tensor, heads: int, allowed: Tensor | None = None, context: Tensor | None = None
) -> Tensor:
    normed = layer_norm(s, f"{name}.ln_1", x)
    source = normed if context is None else layer_norm(s, f"{name}.ln_1_kv", context)
    x = x + multi_head(s, f"{name}.attn", normed, source, heads, allowed)
    if f"{name}.mlp.c_fc.weight" not in s:
        return x
    hidden = gelu(linear(s, f"{name}.mlp.c_fc", layer_norm(s, f"{name}.ln_2", x)))
    return x + linear(s, f"{name}.mlp.c_proj", hidden)


def depth(s: State, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in s if name.startswith(prefix)})


def vision_tokens(s: State, image: Tensor, heads: int) -> Tensor:
    """image (3, H, W) -> tokens (1 + N, W) of the last block, class token first, without a norm."""
    _, _, patch, _ = s["visual.conv1.weight"].shape
    rows = [
        s["visual.conv1.weight"].flatten(1) @ image[:, y : y + patch, x : x + patch].flatten()
        for y in range(0, image.shape[1], patch)
        for x in range(0, image.shape[2], patch)
    ]
    x = torch.stack([s["visual.class_embedding"], *rows]) + s["visual.positional_embedding"]
    x = layer_norm(s, "visual.ln_pre", x)
    for i in range(depth(s, "visual.transformer.resblocks.")):
        x = residual_block(s, f"visual.transformer.resblocks.{i}", x, heads)
    return x


def pool_queries(s: State, name: str, context: Tensor, heads: int) -> Tensor:
    query, normed = layer_norm(s, f"{name}.ln_q", s[f"{name}.query"]), layer_norm(s, f"{name}.ln_k", context)
    return multi_head(s, f"{name}.attn", query, normed, heads)


def two_poolers(
    s: State, tokens: Tensor, kind: str, heads: int, norm: str = "visual.ln_post", where: str = "visual."
) -> tuple[Tensor, Tensor]:
    """Contrastive vector (E,) and context of the decoder (Q, E)."""
    normed = layer_norm(s, norm, tokens)
    context = pool_queries(s, f"{where}attn_pool", normed, heads)
    source = context if kind == "cascade" else normed
    return pool_queries(s, f"{where}attn_pool_contrastive", source, heads)[0], context


def classic_text(
    s: State, ids: Sequence[int], heads: int, correct: bool, valid: Sequence[bool] | None = None
) -> tuple[Tensor, Tensor]:
    """Text feature (E,) and token states (L, W) of padded ids; without a mask, id 0 is a pad."""
    length = len(ids)
    valid = [i != 0 for i in ids] if valid is None else valid
    x = torch.cat([s["text.token_embedding.weight"][list(ids)], s["text.cls_emb"][None]])
    x = x + s["text.positional_embedding"][: length + 1]
    keys = torch.tensor([*valid, True] if correct else [True, *valid])
    allowed = causal(length + 1) & keys
    allowed[:length] = causal(length + 1)[:length]  # of real tokens nothing changes, and nobody reads pads
    for i in range(depth(s, "text.transformer.resblocks.")):
        x = residual_block(s, f"text.transformer.resblocks.{i}", x, heads, allowed)
    return layer_norm(s, "text.ln_final", x[-1]) @ s["text.text_projection"], x[:-1]


def classic_decoder(s: State, states: Tensor, context: Tensor, heads: int) -> Tensor:
    """Logits (L, V)."""
    x = states
    for i in range(depth(s, "text_decoder.resblocks.")):
        x = residual_block(s, f"text_decoder.resblocks.{i}", x, heads, causal(len(x)))
        x = residual_block(s, f"text_decoder.cross_attn.{i}", x, heads, context=context)
    return layer_norm(s, "text_decoder.ln_final", x) @ s["text_decoder.text_projection"]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


# Modern parts


def rope(x: Tensor, heads: int, base: float = 10000.0) -> Tensor:
    """x (T, D): the pair (2i, 2i + 1) of every head is a complex number, turned by position · base^(-2i/W)."""
    width = x.shape[1] // heads
    turned = x.clone()
    for position in range(len(x)):
        for pair in range(width // 2):
            angle = position * base ** (-2 * pair / width)
            turn = torch.complex(
                torch.tensor(math.cos(angle), dtype=x.dtype), torch.tensor(math.sin(angle), dtype=x.dtype)
            )
            for head in range(heads):
                i = head * width + 2 * pair
                z = torch.complex(x[position, i], x[position, i + 1]) * turn
                turned[position, i], turned[position, i + 1] = z.real, z.imag
    return turned


def by_head(s: State, name: str, x: Tensor, heads: int) -> Tensor:
    """RMSNorm of each head of x (T, D), if the file has one."""
    if f"{name}.weight" not in s:
        return x
    return rms_norm(s, name, x.unflatten(-1, (heads, -1))).flatten(-2)


def gated(s: State, name: str, h: Tensor, out: Tensor) -> Tensor:
    if f"{name}.gate.weight" in s:
        out = out / (1 + (-linear(s, f"{name}.gate", h)).exp())
    return linear(s, f"{name}.proj", out)


def modern_block(
    s: State, name: str, x: Tensor, heads: int, context: Tensor | None = None, base: float = 10000.0
) -> Tensor:
    h = rms_norm(s, f"{name}.norm1", x)
    q, k, v = linear(s, f"{name}.attn.qkv", h).chunk(3, -1)
    q = rope(by_head(s, f"{name}.attn.q_norm", q, heads), heads, base)
    k = rope(by_head(s, f"{name}.attn.k_norm", k, heads), heads, base)
    x = x + gated(s, f"{name}.attn", h, attention(q, k, v, heads, causal(len(x))))
    if context is not None:
        h = rms_norm(s, f"{name}.norm_x", x)
        q = by_head(s, f"{name}.xattn.q_norm", linear(s, f"{name}.xattn.q", h), heads)
        k, v = linear(s, f"{name}.xattn.kv", context).chunk(2, -1)
        k = by_head(s, f"{name}.xattn.k_norm", k, heads)
        x = x + gated(s, f"{name}.xattn", h, attention(q, k, v, heads))
    value, gate = linear(s, f"{name}.mlp.w12", rms_norm(s, f"{name}.norm2", x)).chunk(2, -1)
    return x + linear(s, f"{name}.mlp.w3", value * gate / (1 + (-gate).exp()))


def modern_text(
    s: State, ids: Sequence[int], heads: int, pool: str, end: int = 49407, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Text feature (E,) and normed token states (T, W) of unpadded ids."""
    x = s["text.token_embedding.weight"][list(ids)]
    for i in range(depth(s, "text.blocks.")):
        x = modern_block(s, f"text.blocks.{i}", x, heads, base=base)
    x = rms_norm(s, "text.ln_final", x)
    if pool == "mean":
        pooled = x.mean(0)
    elif pool == "eos":
        pooled = x[ids.index(end) if end in ids else len(ids) - 1]
    else:
        q = by_head(s, "text.pool.q_norm", linear(s, "text.pool.q", s["text.pool.query"][0]), heads)
        k, v = linear(s, "text.pool.kv", x).chunk(2, -1)
        pooled = attention(q, by_head(s, "text.pool.k_norm", k, heads), v, heads)[0]
    return linear(s, "text.text_projection", pooled), x


def modern_decoder(
    s: State, states: Tensor, context: Tensor, heads: int, ratio: int = 1, base: float = 10000.0
) -> Tensor:
    """Logits (T, V)."""
    x = states
    for i in range(depth(s, "text_decoder.blocks.")):
        x = modern_block(s, f"text_decoder.blocks.{i}", x, heads, context if i % ratio == 0 else None, base)
    return linear(s, "text_decoder.lm_head", rms_norm(s, "text_decoder.ln_final", x))

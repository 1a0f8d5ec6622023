"""A second implementation of timm's NaFlexVit, image by image, from the tensors of an OpenCLIP file in float64."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import oracle
from helpers.oracle import State


def tokens(s: State, image: Tensor, heads: int) -> Tensor:
    """image (3, H, W) -> tokens (N, W) of timm's NaFlexVit: patches channel last, registers in front and dropped at the
    end, LayerScale, eps 1e-6 everywhere, positions resized to the grid.
    """
    side = math.isqrt(s["visual.trunk.embeds.proj.weight"].shape[1] // 3)
    height, width = image.shape[1] // side, image.shape[2] // side
    rows = [
        image[:, y * side : (y + 1) * side, x * side : (x + 1) * side].permute(1, 2, 0).flatten()
        for y in range(height)
        for x in range(width)
    ]
    positions = s["visual.trunk.embeds.pos_embed"].permute(0, 3, 1, 2).float()
    positions = F.interpolate(positions, (height, width), mode="bicubic", align_corners=False, antialias=True)
    if (height, width) == tuple(s["visual.trunk.embeds.pos_embed"].shape[1:3]):
        positions = s["visual.trunk.embeds.pos_embed"].permute(0, 3, 1, 2)
    x = oracle.linear(s, "visual.trunk.embeds.proj", torch.stack(rows)) + positions[0].flatten(1).T
    registers = s["visual.trunk.embeds.reg_token"][0]
    x = oracle.layer_norm(s, "visual.trunk.norm_pre", torch.cat([registers, x]), eps=1e-6)
    for i in range(oracle.depth(s, "visual.trunk.blocks.")):
        name = f"visual.trunk.blocks.{i}"
        q, k, v = oracle.linear(s, f"{name}.attn.qkv", oracle.layer_norm(s, f"{name}.norm1", x, eps=1e-6)).chunk(3, -1)
        x = x + oracle.linear(s, f"{name}.attn.proj", oracle.attention(q, k, v, heads)) * s[f"{name}.ls1.gamma"]
        hidden = oracle.gelu(oracle.linear(s, f"{name}.mlp.fc1", oracle.layer_norm(s, f"{name}.norm2", x, eps=1e-6)))
        x = x + oracle.linear(s, f"{name}.mlp.fc2", hidden) * s[f"{name}.ls2.gamma"]
    return x[len(registers) :]

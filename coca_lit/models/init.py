"""Initial values of every parameter of CoCa.

OpenCLIP leaves its vocabulary projection uninitialised and its decoder at PyTorch's defaults; here text tower and
decoder share CLIP's rule (Radford et al. 2021; deviations as in openai/CLIP): embeddings 0.02 and 0.01, projections
width^-0.5, outputs of residual branches scaled down by depth.
"""

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from coca_lit.models.layers import AttentionalPooler, CrossAttention, CrossBlock, SelfAttention, SelfBlock

if TYPE_CHECKING:
    from coca_lit.models.coca import CoCa


def init_parameters(model: "CoCa") -> None:
    """Overwrites all parameters of the model."""
    model.image_encoder.init_parameters()
    for module in model.modules():
        if isinstance(module, AttentionalPooler):
            _init_pooler(module)
    _normal(model.image_projection.weight, model.image_projection.in_features**-0.5)
    text = model.text
    _normal(text.token_embedding.weight, 0.02)
    _normal(text.position_embedding, 0.01)
    _normal(text.cls_embedding, 0.01)
    text.norm.reset_parameters()
    _normal(text.projection.weight, text.projection.in_features**-0.5)
    _init_blocks(text.blocks, depth=len(text.blocks))
    if (decoder := model.decoder) is not None:
        _init_blocks(decoder.self_blocks, depth=2 * len(decoder.self_blocks))
        _init_blocks(decoder.cross_blocks, depth=2 * len(decoder.cross_blocks))
        decoder.norm.reset_parameters()
        if decoder.vocabulary.weight is not text.token_embedding.weight:
            _normal(decoder.vocabulary.weight, decoder.vocabulary.in_features**-0.5)
    if model.logit_bias is None:
        nn.init.constant_(model.logit_scale, math.log(1 / 0.07))  # CLIP's initial temperature
    else:  # SigLIP's (Zhai et al. 2023, section 3.2): at first nearly every pair is taken for unrelated, as it is
        nn.init.constant_(model.logit_scale, math.log(10))
        nn.init.constant_(model.logit_bias, -10)


def _init_pooler(pooler: AttentionalPooler) -> None:
    _normal(pooler.query, 1.0)
    _init_attention(pooler.attention, out_std=pooler.attention.out.in_features**-0.5)
    for norm in (pooler.norm_query, pooler.norm_context, pooler.norm_out):
        norm.reset_parameters()


def _init_blocks(blocks: nn.ModuleList, depth: int) -> None:
    """Every block adds two branches to the residual stream: the deviation of their outputs shrinks so that the sum
    keeps its scale.
    """
    for block in blocks:
        assert isinstance(block, SelfBlock | CrossBlock)
        width = block.norm_1.normalized_shape[0]
        branch_std = width**-0.5 * (2 * depth) ** -0.5
        _init_attention(block.attention, branch_std)
        _init_linear(block.mlp[0], (2 * width) ** -0.5)
        _init_linear(block.mlp[2], branch_std)
        for norm in (m for m in block.children() if isinstance(m, nn.LayerNorm)):
            norm.reset_parameters()


def _init_attention(attention: SelfAttention | CrossAttention, out_std: float) -> None:
    for name, linear in attention.named_children():
        assert isinstance(linear, nn.Linear)
        _init_linear(linear, out_std if name == "out" else linear.in_features**-0.5)


def _init_linear(linear: nn.Module, std: float) -> None:
    assert isinstance(linear, nn.Linear)
    _normal(linear.weight, std)
    nn.init.zeros_(linear.bias)


def _normal(tensor: Tensor, std: float) -> None:
    nn.init.normal_(tensor, std=std)

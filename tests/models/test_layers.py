"""Attention of few queries, for which plain products are faster than the fused kernel, is the same attention; blocks
with MLPs of other widths.
"""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from coca_lit.models.init import init_blocks
from coca_lit.models.layers import CrossAttention, CrossBlock, SelfBlock


@pytest.mark.parametrize(("queries", "fused"), [(1, False), (16, False), (17, True)])
def test_few_queries_attend_by_plain_products(queries: int, fused: bool) -> None:
    torch.manual_seed(0)
    attention = CrossAttention(32, 24, heads=2)
    x, context = torch.randn(3, queries, 32), torch.randn(3, 50, 24)
    expected = attention(x, attention.keys_values(context))  # with gradients the kernel is always the fused one
    with (
        torch.no_grad(),
        mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as kernel,
    ):
        found = attention(x, attention.keys_values(context))
    assert kernel.called == fused
    torch.testing.assert_close(found, expected)


def test_width_of_the_mlp() -> None:
    """Its initial deviations stay those of the width of the block."""
    torch.manual_seed(0)
    blocks = [SelfBlock(64, 2, mlp_width=512), CrossBlock(64, 48, 2, mlp_width=512)]
    init_blocks(blocks, depth=2)
    x, context = torch.randn(2, 5, 64), torch.randn(2, 7, 48)
    for block, out in zip(blocks, (blocks[0](x), blocks[1](x, context)), strict=True):
        assert [tuple(linear.weight.shape) for linear in (block.mlp[0], block.mlp[2])] == [(512, 64), (64, 512)]
        assert block.mlp[0].weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
        assert block.mlp[2].weight.std().item() == pytest.approx(64**-0.5 * 4**-0.5, rel=0.05)
        assert out.shape == x.shape

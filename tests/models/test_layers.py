"""Attention of few queries, for which plain products are faster than the fused kernel, is the same attention."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from coca_lit.models.layers import CrossAttention


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

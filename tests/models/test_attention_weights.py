"""The weights of attention that generation returns are those of the pass."""

import pytest
import torch

from helpers.family import check_attention_of_the_decoder


@pytest.mark.parametrize("pooler", ["single", "parallel", "cascade"])
def test_weights_of_the_pooler_give_its_output(tiny_model, pooler):
    model = tiny_model(pooler=pooler, pooler_heads=1)
    tokens = torch.randn(2, 16, model.image_encoder.width)
    generative = model.pooling.generative
    _, values = generative.attention.keys_values(generative.norm_context(tokens))  # (B, 1, S, E)
    expected = generative.norm_out(generative.attention.out(model.pooling.attention(tokens) @ values[:, 0]))
    torch.testing.assert_close(model.pooling(tokens)[1], expected, atol=1e-5, rtol=1e-5)


def test_the_decoder_looks_where_its_own_pass_attends():
    check_attention_of_the_decoder()

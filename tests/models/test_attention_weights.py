"""The weights of attention that generation returns are those of the pass."""

import pytest
import torch

from coca_lit.models.layers import CrossAttention
from coca_lit.models.variants.modern import ImageAttention


@pytest.mark.parametrize("pooler", ["single", "parallel", "cascade"])
def test_weights_of_the_pooler_give_its_output(tiny_model, pooler):
    model = tiny_model(pooler=pooler, pooler_heads=1)
    tokens = torch.randn(2, 16, model.image_encoder.width)
    generative = model.pooling.generative
    _, values = generative.attention.keys_values(generative.norm_context(tokens))  # (B, 1, S, E)
    expected = generative.norm_out(generative.attention.out(model.pooling.attention(tokens) @ values[:, 0]))
    torch.testing.assert_close(model.pooling(tokens)[1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "family",
    [
        {},
        {"text_tower": "modern", "decoder_layers": 3, "decoder_args": {"cross_attention_every": 2}},
        {"text_tower": "two_pass", "pooler": "mean", "text_layers": 3, "decoder_layers": 3},
    ],
    ids=["classic", "modern", "mammut"],
)
@torch.no_grad()
def test_the_decoder_looks_where_its_own_pass_attends(tiny_model, family):
    """Softmax of q · k / √d, with the queries of an ordinary pass: the mean over layers and heads."""
    model = tiny_model(**family)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    decoder, queries = model.decoder, []
    layers = [module for module in decoder.modules() if isinstance(module, CrossAttention | ImageAttention)]
    for layer in layers:
        layer.q.register_forward_hook(lambda _, __, out: queries.append(out))
    image_tokens = model.encode_image_tokens(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))
    states = torch.randn(2, 6, model.config.text_width)
    decoder(states, image_tokens)
    found = []
    for layer, q, (keys, _) in zip(layers, queries, decoder.keys_values(image_tokens), strict=True):
        q = q.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        found.append((q @ keys.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1))
    torch.testing.assert_close(decoder.attention(states, image_tokens), torch.stack(found).mean(0))

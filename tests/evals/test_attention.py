"""Maps of where a model looked for each word: exact weights, whole words, and places instead of pooled tokens."""

import numpy as np
import pytest
import torch
from PIL import Image

from coca_lit.data.scenes.render import scene_records
from coca_lit.evals.attention import attention_samples, maps_of_captions, overlay, words_of
from coca_lit.models import create_model
from coca_lit.models.layers import CrossAttention
from coca_lit.models.variants.modern import ImageAttention
from coca_lit.tokenizer import get_tokenizer

VIT = {
    "image_encoder": "vit_base_patch32_clip_224",
    "image_encoder_args": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 1},
}


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


@pytest.mark.parametrize(("encoder", "grid"), [({}, 4), (VIT, 4)], ids=["convolutional", "with a class token"])
def test_maps_are_products_of_both_attentions(encoder, grid):
    torch.manual_seed(0)
    model = create_model("coca_tiny", **encoder).train()
    pixels = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    captions = model.generate(pixels[None], min_length=6, return_attention=True)
    ((words, maps),) = maps_of_captions(model, pixels, captions.ids, captions.attention)
    assert model.training
    model.eval()
    assert " ".join(words) == model.tokenizer.decode(captions.ids[0])
    assert maps.shape == (len(words), grid, grid)
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(len(words)))
    places = model.pooling.attention(model.image_encoder(pixels[None]))[0]
    positions = [i for i, token in enumerate(captions.ids[0].tolist()) if token > 3]  # of words, one token each
    for position, found in zip(positions, maps, strict=True):
        naive = sum(weight * row for weight, row in zip(captions.attention[0, position], places, strict=True))
        naive = naive[-grid * grid :]
        torch.testing.assert_close(found.flatten(), naive / naive.sum(), atol=1e-6, rtol=1e-4)


def test_words_of_several_tokens():
    tokenizer = get_tokenizer("clip", 30)
    ids = tokenizer.encode("a skateboarder's antidisestablishmentarianism, ok")
    words = words_of(tokenizer, [*ids, 0, 0])
    assert " ".join(word for word, _ in words) == tokenizer.decode(ids)
    assert [i for _, positions in words for i in positions] == list(range(1, len(ids) - 1))
    assert max(len(positions) for _, positions in words) > 1
    assert words_of(tokenizer, [tokenizer.sot_id, tokenizer.eot_id]) == []


def test_overlay_is_bright_where_it_looked():
    attention = torch.zeros(4, 4)
    attention[0, 3] = 1
    drawn = np.asarray(overlay(Image.new("RGB", (32, 32), (90, 90, 90)), attention).convert("L"), dtype=float)
    quarter = len(drawn) // 4
    corner = drawn[:quarter, -quarter:].mean()
    assert corner > drawn[-quarter:, :quarter].mean() + 50


def test_captions_that_are_drawn_are_the_same_each_time(tiny_model):
    model, records = tiny_model(), scene_records("val", count=2)
    first, again = (attention_samples(model, records, 2, {"strategy": "sample"}) for _ in range(2))
    assert [sample["caption"] for sample in first] == [sample["caption"] for sample in again]

"""Maps of where a model looked for each word: exact weights, whole words, and places instead of pooled tokens."""

import pytest
import torch

from coca_lit.models import create_model
from coca_lit.projects.attention.maps import maps_of_captions, words_of
from coca_lit.tokenizer import get_tokenizer

VIT = {
    "image_encoder": "vit_base_patch32_clip_224",
    "image_encoder_args": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 1},
}


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

"""Maps of where a model looked for each word: exact weights, whole words, and places instead of pooled tokens."""

import json
from pathlib import Path

import pytest
import torch

from coca_lit.data.scenes.render import render, scene_records
from coca_lit.evals import Settings
from coca_lit.evals.captions import CaptionScores
from coca_lit.models import create_model
from coca_lit.projects.attention.maps import maps_of_captions, words_of
from coca_lit.tokenizer import get_tokenizer
from coca_lit.tools.demo.answers import write_captions
from helpers.running import without_java

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


# In reports and the demo


def test_every_word_has_a_picture_of_where_the_decoder_looked(tiny_model) -> None:
    for candidate in write_captions(tiny_model(), render(7, 64), "beam", 3):
        assert candidate.words
        assert " ".join(word for word, _ in candidate.words) == candidate.caption
        assert all(picture.startswith("data:image/png;base64,") for _, picture in candidate.words)


def test_samples_for_the_report(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_java(monkeypatch)
    options = {"strategy": "beam", "num_beams": 2, "max_length": 8}
    evaluation = CaptionScores("mine", scene_records("val", count=5))
    evaluation.evaluate(tiny_model(), Settings(tmp_path, attention=2, generate=options))
    captions = [row["caption"] for row in json.loads((tmp_path / "predictions" / "mine.json").read_text())]
    first, _ = json.loads((tmp_path / "samples" / "mine_attention.json").read_text())
    assert [part["word"] for part in first["words"]] == captions[0].split()

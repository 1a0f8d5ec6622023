"""The word lists of the presets match the data that they are for, and the sizes of a study its publication."""

from itertools import product

import pytest
import torch

from coca_lit.data.scenes.render import AXES, COLOURS, SHAPES, WORDINGS
from coca_lit.data.scenes.render import SIZES as THING_SIZES
from coca_lit.models import create_model
from coca_lit.models.presets import VOCABULARIES
from helpers.slow import slow
from helpers.study import PROFILE, SIZES, SMALL, millions

FRAMES = ((w.first + w.more).format(thing="", **phrases) for w, phrases in product(WORDINGS, AXES.values()))
CAPTIONS = sorted({"a", *THING_SIZES, *COLOURS, *SHAPES, *" ".join(FRAMES).split()})


def test_vocabulary_of_the_scenes() -> None:
    assert VOCABULARIES["scenes"] == CAPTIONS
    assert create_model("coca_tiny", tokenizer="scenes").tokenizer.spec == CAPTIONS


def test_an_unknown_vocabulary_suggests_one() -> None:
    with pytest.raises(ValueError, match=r"'scenez'.*'scenes'"):
        create_model("coca_tiny", tokenizer="scenez")


@pytest.mark.parametrize("name", [SMALL, *slow(*(name for name in SIZES if name != SMALL))])
def test_parameters_of_the_study(name: str) -> None:
    with torch.device("meta"):
        found = millions(create_model(name))
    assert found == pytest.approx(PROFILE[name][:3], abs=0.0051)  # published with two decimals


def test_arguments_of_an_image_encoder_are_added_to_those_of_the_preset() -> None:
    """Else a study's L/32 with a share of patches left out would be a B/32."""
    with torch.device("meta"):
        sizes = {"text_layers": 1, "decoder_layers": 1}
        model = create_model("coca_vit_s16", image_encoder_args={"patch_drop_rate": 0.5}, **sizes)
        other = create_model("coca_vit_s16", image_encoder="vit_base_patch32_clip_224", **sizes)
        timm = create_model("coca_vit_s16", image_encoder="vit_base_patch16_clip_224", **sizes)
    assert model.config.image_encoder_args["embed_dim"] == 384
    assert model.config.image_encoder_args["patch_drop_rate"] == 0.5
    assert other.image_encoder.width == 384
    assert timm.image_encoder.width == 768

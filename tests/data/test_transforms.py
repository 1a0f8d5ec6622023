"""Pixels against OpenCLIP's own transform, which is imported only here."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from coca_lit.data.transforms import build_transform

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("width", "height"), [(300, 240), (97, 333), (64, 64), (40, 30)])
def test_pixels_equal_open_clip(train, width, height):
    image_transform = pytest.importorskip("open_clip.transform").image_transform
    image = noise(width, height)
    torch.manual_seed(3)
    expected = image_transform(64, is_train=train)(image)
    torch.manual_seed(3)
    pixels = build_transform(train, 64)(image)
    assert pixels.dtype == torch.uint8
    assert ((pixels / 255 - MEAN) / STD - expected).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode):
    for train in (False, True):
        assert build_transform(train, 32)(noise(50, 40, mode)).shape == (3, 32, 32)


def test_an_image_of_the_right_size_is_unchanged():
    image = noise(32, 32)
    assert torch.equal(build_transform(size=32)(image), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_transforms_travel_to_spawned_workers():
    image, transform = noise(50, 40), build_transform(size=32)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), transform(image))


def test_size_must_be_positive():
    with pytest.raises(ValueError, match="at least 1 pixel"):
        build_transform(size=0)

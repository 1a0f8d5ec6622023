"""Pixels against OpenCLIP's own transform, which is imported only here: equal for evaluation, close for training."""

import pickle
import random
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from coca_lit.data.transforms import Box, RandomCrop, augmented, build_transform, load_pixels, random_box, resized

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class TorchDraws:
    """Python's random numbers from torch's global generator, as torchvision draws them."""

    def uniform(self, low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high).item()

    def randint(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, size=(1,)).item())


@pytest.mark.parametrize(("width", "height"), [(300, 240), (40, 30)])
def test_pixels_of_an_evaluation_equal_open_clip(width, height):
    image_transform = pytest.importorskip("open_clip.transform").image_transform
    image = noise(width, height)
    pixels = build_transform(64)(image)
    assert pixels.dtype == torch.uint8
    assert ((pixels / 255 - MEAN) / STD - image_transform(64, is_train=False)(image)).abs().max() < 1e-6


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("width", "height"), [(300, 240), (97, 333), (40, 31), (1, 200)])
def test_other_ways_of_resizing_equal_open_clip(width, height, interpolation, resize_mode):
    image_transform = pytest.importorskip("open_clip.transform").image_transform
    if resize_mode == "longest" and width == 1:
        return  # OpenCLIP's has no pixel left
    image = noise(width, height, "L")
    theirs = image_transform(64, is_train=False, interpolation=interpolation, resize_mode=resize_mode)(image)
    pixels = build_transform(64, interpolation, resize_mode)(image)
    assert ((pixels / 255 - MEAN) / STD - theirs).abs().max() < 1e-6


@pytest.mark.parametrize(("width", "height"), [(500, 375), (97, 333), (40, 30)])
def test_training_crops_are_those_of_open_clip(width, height):
    """Noise is the worst case; boxes are smaller and larger than the result."""
    theirs = pytest.importorskip("open_clip.transform").image_transform(64, is_train=True)
    image = noise(width, height)
    for seed in range(5):
        box = random_box(height, width, random.Random(seed))
        theirs.transforms[0].get_params = lambda *_, box=box: tuple(box)
        expected = (theirs(image) * STD + MEAN) * 255
        pixels = RandomCrop(64)(pixels_of(image), random.Random(seed))
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 64, 64))
        assert (pixels - expected).abs().max() < 2.01


def test_nothing_outside_of_the_box_gets_into_the_crop():
    pixels = pixels_of(noise(80, 60))
    changed = torch.full_like(pixels, 255)
    box = Box(top=10, left=20, height=40, width=30)
    inside = (slice(None), slice(10, 50), slice(20, 50))
    changed[inside] = pixels[inside]
    assert torch.equal(resized(pixels, box, (16, 16)), resized(changed, box, (16, 16)))


@pytest.mark.parametrize(
    "size", [(375, 500), (500, 375), (256, 256), (300, 450), (450, 300), (30, 900), (900, 30), (1, 1)]
)
def test_boxes_follow_torchvision(size):
    for seed in range(50):
        torch.manual_seed(seed)
        expected = RandomResizedCrop.get_params(torch.empty(3, *size), scale=[0.9, 1.0], ratio=[3 / 4, 4 / 3])
        torch.manual_seed(seed)
        assert random_box(*size, TorchDraws()) == expected


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode):
    image = noise(50, 40, mode)
    assert build_transform(32)(image).shape == (3, 32, 32)
    assert augmented(lambda: image, RandomCrop(32), random.Random(0)).shape == (3, 32, 32)


def test_pictures_of_a_function_are_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(40, 20).save(file := BytesIO(), "JPEG", exif=exif)
    assert load_pixels(lambda: Image.open(file)).shape == (3, 40, 20)


def test_transforms_travel_to_spawned_workers():
    image, transform, crop = noise(50, 40), build_transform(size=32), RandomCrop(32)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), transform(image))
    pixels = pixels_of(image)
    assert torch.equal(pickle.loads(pickle.dumps(crop))(pixels, random.Random(1)), crop(pixels, random.Random(1)))

"""OpenCLIP's image preprocessing without the normalisation: uint8 out, the model normalises on the device.

Pixels equal `open_clip.transform.image_transform`: there is no horizontal flip, and the crop is mild (90 to 100 % of
the area), because captions speak of left and right and of things near the border.
"""

from collections.abc import Callable

from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, RandomResizedCrop, Resize

Transform = Callable[[Image.Image], Tensor]  # any PIL image -> (3, size, size) uint8


def build_transform(train: bool = False, size: int = 224) -> Transform:
    """Random resized crop for training; shortest side to `size` and centre crop otherwise.

    The random crop draws from torch's global generator: seed it around the call.
    """
    if size < 1:
        raise ValueError(f"the image size must be at least 1 pixel, not {size}")
    bicubic = InterpolationMode.BICUBIC
    if train:
        crop = RandomResizedCrop(size, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3), interpolation=bicubic)
        return Compose([_to_rgb, crop, PILToTensor()])
    return Compose([_to_rgb, Resize(size, interpolation=bicubic), CenterCrop(size), PILToTensor()])


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")

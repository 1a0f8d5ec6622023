"""An image encoder that ends at a middle layer: the best features for other tasks may not be in the last one
(Perception Encoder, Bolya et al. 2025, arXiv 2504.13181).
"""

from functools import partial
from typing import Any

from torch import nn

from coca_lit.errors import check_number
from coca_lit.models.image import ImageEncoder


class MiddleLayer(ImageEncoder):
    """The first layers of one of timm's models; later ones, and a norm after the last one, do not exist.

    Args:
        image_size: side of the square input in pixels.
        encoder: name of a timm model.
        layer: the last one, counted from 0: blocks of a transformer, resolutions of a convolutional net. Negative
            numbers count from the end.
        arguments: for timm.
    """

    def __init__(self, image_size: int, encoder: str, layer: int, **arguments: Any) -> None:
        check_number("layer", layer, whole=True)
        super().__init__(encoder, image_size, **arguments)
        self._build = partial(_built_until, layer, self._build)
        self.trunk = _until(layer, self.trunk)
        self.width = layers_of(self.trunk)[layer]


def layers_of(trunk: Any) -> list[int]:
    """The width of each layer of a timm model; raises ValueError if its family does not give away middle layers."""
    if not hasattr(trunk, "forward_intermediates") or not hasattr(trunk, "prune_intermediate_layers"):
        raise ValueError(
            f"timm does not give away the middle layers of a {type(trunk).__name__}: choose another encoder"
        )
    return [int(layer["num_chs"]) for layer in trunk.feature_info]


def _until(layer: int, trunk: Any) -> nn.Module:
    count = len(layers_of(trunk))
    if not -count <= layer < count:
        raise ValueError(f"layer must be between {-count} and {count - 1} in a {type(trunk).__name__}, got {layer}")
    trunk.prune_intermediate_layers([layer % count], prune_norm=True, prune_head=True)
    return trunk


def _built_until(layer: int, build: Any, image_size: int) -> nn.Module:
    return _until(layer, build(image_size))

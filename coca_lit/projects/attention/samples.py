"""Pictures of where each word of a caption comes from, for the report."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.data.transforms import build_transform
from coca_lit.evals.inference import seeded_by
from coca_lit.evals.samples import spread, thumbnail
from coca_lit.models import CoCa
from coca_lit.models.inputs import Input
from coca_lit.projects.attention.maps import maps_of_captions

OVERLAY = 120  # pixels of an image with a map


def word_map_samples(
    model: CoCa, records: Sequence[Record], count: int, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """`count` images spread over the records: {"image", "caption", "words": [{"word", "map"}]}, pictures as data URIs.

    A map is the picture as the model sees it, with bright colours where the word comes from. `CoCa.generate` gets
    `options`.
    """
    transform = build_transform(**model.preprocessing)
    samples = []
    for record in spread(records, count):
        pixels = transform(record.image())  # (3, H, W) uint8, or an `Input`
        own = seeded_by([record], options, model.device)
        captions = model.generate(pixels[None], **own, return_attention=True)
        assert captions.attention is not None
        ((words, maps),) = maps_of_captions(model, pixels, captions.ids, captions.attention)
        seen = pixels.picture() if isinstance(pixels, Input) else pixels  # (3, H, W)
        picture = Image.fromarray(seen.permute(1, 2, 0).cpu().numpy())
        rows = [
            {"word": word, "map": thumbnail(overlay(picture, part))} for word, part in zip(words, maps, strict=True)
        ]
        samples.append({"image": thumbnail(picture), "caption": " ".join(words), "words": rows})
    return samples


def overlay(picture: Image.Image, attention: Tensor) -> Image.Image:
    """The picture in grey, with a map (h, w) over it in colours that cover it the more, the greater the attention."""
    scaled = (attention - attention.min()) / (attention.max() - attention.min()).clamp(min=1e-12)
    size = (OVERLAY * picture.width // max(picture.size), OVERLAY * picture.height // max(picture.size))
    strength = Image.fromarray((scaled * 255).byte().numpy()).resize(size, Image.Resampling.BICUBIC)
    colours = Image.fromarray(colormaps["plasma"](np.asarray(strength), bytes=True)).convert("RGB")
    grey = picture.resize(size, Image.Resampling.BICUBIC).convert("L").convert("RGB")
    return Image.composite(colours, grey, strength.point([round(0.85 * level) for level in range(256)]))

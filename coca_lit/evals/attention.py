"""Where the model looked as it wrote each word of a caption.

The decoder attends to the pooled tokens, and each of those is a mixture of places: its map over the image is the
decoder's attention (words × pooled tokens) times the pooler's (pooled tokens × places). Both are means over heads, the
decoder's also over layers. What the encoder has mixed before, attention cannot show: read the maps as hints.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.data.transforms import build_transform
from coca_lit.evals.inference import evaluating, seeded_by
from coca_lit.evals.samples import spread, thumbnail
from coca_lit.models import CoCa
from coca_lit.models.inputs import Images, Input
from coca_lit.tokenizer import Tokenizer

OVERLAY = 120  # pixels of an image with its attention map


def attention_samples(
    model: CoCa, records: Sequence[Record], count: int, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """`count` images spread over the records: {"image", "caption", "words": [{"word", "map"}]}, pictures as data URIs.

    A map is the picture as the model sees it, with bright colours where it looked. `CoCa.generate` gets `options`.
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
        drawn = [thumbnail(overlay(picture, part)) for part in maps]
        rows = [{"word": word, "map": image} for word, image in zip(words, drawn, strict=True)]
        samples.append({"image": thumbnail(picture), "caption": " ".join(words), "words": rows})
    return samples


def maps_of_captions(model: CoCa, pixels: Images, ids: Tensor, attention: Tensor) -> list[tuple[list[str], Tensor]]:
    """The words of each caption (N, L) of an image (3, H, W), or of an `Input`, and where the model looked for each
    word: (words, h, w), sums of 1, from the attention (N, L, Q).
    """
    images = pixels[None].to(model.device)
    pooled = evaluating(model, lambda x: model.pooling.attention(model.image_encoder(x)), images)
    places = pooled[0, :, model.image_encoder.prefix_tokens :].float()  # (Q, S) without class tokens
    side = math.isqrt(places.shape[1])
    grid = pixels.token_grid() if isinstance(pixels, Input) else (side, side)
    found = []
    for row, weights in zip(ids.tolist(), attention, strict=True):
        maps = (weights @ places).cpu()  # (L, S)
        words = words_of(model.tokenizer, row)
        per_word = torch.stack([maps[positions].mean(dim=0) for _, positions in words]) if words else maps[:0]
        per_word = per_word / per_word.sum(dim=1, keepdim=True).clamp(min=1e-12)
        found.append(([word for word, _ in words], per_word.unflatten(1, grid)))
    return found


def words_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of a caption, each with the positions of its tokens: a word may be several."""
    words: list[tuple[str, list[int]]] = []
    before = ""
    for position, token in enumerate(ids):
        if token == tokenizer.eot_id:
            break
        text = tokenizer.decode(ids[: position + 1])
        if not text or text == before:
            continue  # the start, or a token without text
        if words and len(text.split()) == len(before.split()):
            words[-1][1].append(position)
        else:
            words.append(("", [position]))
        words[-1] = (text.split()[-1], words[-1][1])
        before = text
    return words


def overlay(picture: Image.Image, attention: Tensor) -> Image.Image:
    """The picture in grey, with a map (h, w) over it in colours that cover it the more, the greater the attention."""
    scaled = (attention - attention.min()) / (attention.max() - attention.min()).clamp(min=1e-12)
    size = (OVERLAY * picture.width // max(picture.size), OVERLAY * picture.height // max(picture.size))
    strength = Image.fromarray((scaled * 255).byte().numpy()).resize(size, Image.Resampling.BICUBIC)
    colours = Image.fromarray(colormaps["plasma"](np.asarray(strength), bytes=True)).convert("RGB")
    grey = picture.resize(size, Image.Resampling.BICUBIC).convert("L").convert("RGB")
    return Image.composite(colours, grey, strength.point([round(0.85 * level) for level in range(256)]))

"""Where the model looked as it wrote each word of a caption.

The decoder attends to the pooled tokens, and each of those is a mixture of places: its map over the image is the
decoder's attention (words × pooled tokens) times the pooler's (pooled tokens × places). Both are means over heads, the
decoder's also over layers. What the encoder has mixed before, attention cannot show: read the maps as hints.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from coca_lit.evals.inference import evaluating
from coca_lit.models import CoCa
from coca_lit.models.inputs import Images, Input
from coca_lit.tokenizer import Tokenizer


def maps_of_captions(model: CoCa, pixels: Images, ids: Tensor, attention: Tensor) -> list[tuple[list[str], Tensor]]:
    """The words of each of N captions of an image, and for each of them a map over the image (words, h, w) with a sum
    of 1.

    Args:
        pixels: the image (3, H, W), or an `Input`.
        ids: tokens (N, L).
        attention: of the decoder (N, L, Q) to the pooled tokens.
    """
    images = pixels[None].to(model.device)
    with evaluating(model):
        pooled = model.pooling.attention(model.image_encoder(images))
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

"""Samples of what a model does: as plain values in a JSON file for the report, which then needs no data set, and as a
sheet of captioned images.
"""

import base64
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.data.transforms import build_transform
from coca_lit.evals.inference import evaluating
from coca_lit.metrics.captions import is_reference
from coca_lit.models import CoCa
from coca_lit.tokenizer import Tokenizer

THUMBNAIL = 240  # pixels of the longer side
OVERLAY = 120  # pixels of an image with its attention map
TOP = 5
COLUMNS, CARD, MARGIN, LINE = 4, 260, 12, 17  # of the sheet; the last three in pixels
INK, GREY, GREEN = (25, 25, 30), (120, 120, 128), (20, 120, 60)


def caption_samples(
    records: Sequence[Record], captions: Mapping[int | str, str], count: int = 12
) -> list[dict[str, Any]]:
    """`count` images spread over the records: {"image", "caption", "exact", "references"} and "question" where one was
    asked; see `thumbnail` for the image.
    """
    return [
        {
            **({"question": record.question} if record.question else {}),
            "image": thumbnail(record.image()),
            "caption": captions[record.id],
            "exact": is_reference(captions[record.id], record.captions),
            "references": list(dict.fromkeys(record.captions)),
        }
        for record in spread(records, count)
    ]


def retrieval_samples(
    records: Sequence[Record], images: Tensor, texts: Tensor, image_of_text: Tensor, count: int = 4
) -> dict[str, list[dict[str, Any]]]:
    """The five best answers to `count` queries in both directions, each with "hit": whether it is right.

    images (I, E), texts (T, E) and image_of_text (T,) come from `embed_pairs`. Returns {"text_to_image": [{"text",
    "answers": [{"image", "hit"}]}], "image_to_text": [{"image", "answers": [{"text", "hit"}]}]}.
    """
    captions = [caption for record in records for caption in record.captions]
    samples: dict[str, list[dict[str, Any]]] = {"text_to_image": [], "image_to_text": []}
    for i in spread(range(len(records)), count):
        text = int((image_of_text == i).nonzero()[0])
        best_images = _top(images @ texts[text])
        answers = [{"image": thumbnail(records[j].image()), "hit": j == i} for j in best_images]
        samples["text_to_image"].append({"text": captions[text], "answers": answers})
        best_texts = _top(texts @ images[i])
        found = [{"text": captions[t], "hit": int(image_of_text[t]) == i} for t in best_texts]
        samples["image_to_text"].append({"image": thumbnail(records[i].image()), "answers": found})
    return samples


def thumbnail(image: Image.Image) -> str:
    """A data URI: small images as they are (PNG), larger ones reduced (JPEG)."""
    buffer = io.BytesIO()
    small = max(image.size) <= THUMBNAIL
    if not small:
        image = image.copy()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, "PNG" if small else "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def spread(items: Sequence[Any], count: int) -> Sequence[Any]:
    return items[:: max(len(items) // count, 1)][:count]


def _top(similarity: Tensor) -> list[int]:
    return torch.topk(similarity, min(TOP, len(similarity))).indices.tolist()


# The sheet


def sample_sheet(records: Sequence[Record], captions: Mapping[int | str, str], count: int = 12) -> Image.Image:
    """Picture of `count` images spread over the records. A caption that equals a reference is green."""
    step = max(len(records) // count, 1)
    chosen = records[::step][:count]
    rows = -(-len(chosen) // COLUMNS)
    height = CARD + 7 * LINE + MARGIN
    sheet = Image.new("RGB", (COLUMNS * (CARD + MARGIN) + MARGIN, rows * height + MARGIN), "white")
    for i, record in enumerate(chosen):
        corner = (MARGIN + i % COLUMNS * (CARD + MARGIN), MARGIN + i // COLUMNS * height)
        _draw_card(sheet, corner, record, captions[record.id])
    return sheet


def _draw_card(sheet: Image.Image, corner: tuple[int, int], record: Record, caption: str) -> None:
    picture = record.image()
    enlarge = Image.Resampling.NEAREST if max(picture.size) < CARD / 2 else Image.Resampling.BICUBIC
    scale = CARD / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    sheet.paste(picture.resize(size, enlarge), corner)
    draw = ImageDraw.Draw(sheet)
    x, y = corner[0], corner[1] + CARD + 4
    y = _write(draw, x, y, record.question, INK, lines=2)
    y = _write(draw, x, y, caption or "(empty)", GREEN if is_reference(caption, record.captions) else INK, lines=3)
    for reference in list(dict.fromkeys(record.captions))[:2]:
        y = _write(draw, x, y, reference, GREY, lines=2)


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, colour: tuple[int, int, int], lines: int) -> int:
    for line in textwrap.wrap(text, width=40, max_lines=lines, placeholder=" …"):
        draw.text((x, y), line, fill=colour, font=ImageFont.load_default(size=13))
        y += LINE
    return y + 2


# Attention maps. The decoder attends to the pooled tokens, and each of those is a mixture of places: its map over the
# image is the decoder's attention (words × pooled tokens) times the pooler's (pooled tokens × places). Both are means
# over heads, the decoder's also over layers. What the encoder has mixed before, attention cannot show: read the maps as
# hints.


def attention_samples(
    model: CoCa, records: Sequence[Record], count: int, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """`count` images spread over the records: {"image", "caption", "words": [{"word", "map"}]}, pictures as data URIs.

    A map is the picture as the model sees it, with bright colours where it looked. `CoCa.generate` gets `options`.
    """
    transform = build_transform(**model.preprocessing)
    samples = []
    for record in spread(records, count):
        pixels = transform(record.image())  # (3, H, W) uint8
        words, maps = word_maps(model, pixels, options)
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        drawn = [thumbnail(overlay(picture, part)) for part in maps]
        rows = [{"word": word, "map": image} for word, image in zip(words, drawn, strict=True)]
        samples.append({"image": thumbnail(picture), "caption": " ".join(words), "words": rows})
    return samples


def word_maps(model: CoCa, pixels: Tensor, options: Mapping[str, Any]) -> tuple[list[str], Tensor]:
    """The words of the caption of an image (3, H, W), and where the model looked for each: (words, G, G), sums of 1."""
    images = pixels[None]
    captions = model.generate(images, **options, return_attention=True)
    assert captions.attention is not None
    pooled = evaluating(model, lambda x: model.pooling.attention(model.image_encoder(x)), images.to(model.device))
    places = pooled[0, :, model.image_encoder.prefix_tokens :].float()  # (Q, S) without class tokens
    grid = math.isqrt(places.shape[1])
    maps = (captions.attention[0] @ places).cpu()  # (L, S)
    words = words_of(model.tokenizer, captions.ids[0].tolist())
    per_word = torch.stack([maps[positions].mean(dim=0) for _, positions in words]) if words else maps[:0]
    per_word = per_word / per_word.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return [word for word, _ in words], per_word.unflatten(1, (grid, grid))


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
    """The picture in grey, with a map (G, G) over it in colours that cover it the more, the greater the attention."""
    scaled = (attention - attention.min()) / (attention.max() - attention.min()).clamp(min=1e-12)
    size = (OVERLAY, OVERLAY)
    strength = Image.fromarray((scaled * 255).byte().numpy()).resize(size, Image.Resampling.BICUBIC)
    colours = Image.fromarray(colormaps["plasma"](np.asarray(strength), bytes=True)).convert("RGB")
    grey = picture.resize(size, Image.Resampling.BICUBIC).convert("L").convert("RGB")
    return Image.composite(colours, grey, strength.point([round(0.85 * level) for level in range(256)]))

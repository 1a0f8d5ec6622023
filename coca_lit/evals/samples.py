"""Samples of what a model does: as plain values in a JSON file for the report, which then needs no data set, and as a
sheet of captioned images.
"""

import base64
import io
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocoevalcap.cider.cider import Cider
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.metrics.captions import is_reference, words_of

THUMBNAIL = 240  # pixels of the longer side
TOP = 5
ROWS = 1024  # queries that are compared with all answers at a time
COLUMNS, CARD, STRIP, MARGIN, LINE = 4, 260, 120, 12, 17  # of the sheets; all but the first in pixels
HEADING = 2 * LINE + 8  # pixels: a title and a line that explains
INK = (25, 25, 30)
GREY = (120, 120, 128)
GREEN = (20, 120, 60)


def caption_samples(
    records: Sequence[Record], captions: Mapping[int | str, str], count: int = 12
) -> list[dict[str, Any]]:
    """`count` images spread over the records: {"image", "caption", "exact", "references"} and "question" where one was
    asked; see `thumbnail` for the image.
    """
    return [
        {
            **({"question": record.question} if record.question else {}),
            "image": thumbnail(picture(record)),
            "caption": captions[record.id],
            "exact": is_reference(captions[record.id], record.captions),
            "references": list(dict.fromkeys(record.captions)),
        }
        for record in spread(records, count)
    ]


def worst_captions(
    records: Sequence[Record], captions: Mapping[int | str, str], count: int = 8
) -> list[dict[str, Any]]:
    """The `count` captions that are furthest from their references, as `caption_samples`, the worst first.

    CIDEr judges: it weighs what is special about an image. Words are taken as they stand, without Java's tokenizer.
    """
    words = {i: [words_of(text) for text in r.captions] for i, r in enumerate(records)}
    written = {i: [words_of(captions[r.id])] for i, r in enumerate(records)}
    _, of_images = Cider().compute_score(words, written)
    worst = [records[i] for i in np.argsort(of_images, kind="stable")[:count]]
    return [sample for sample in caption_samples(worst, captions, count) if not sample["exact"]]


def retrieval_samples(
    records: Sequence[Record], images: Tensor, texts: Tensor, image_of_text: Tensor, count: int = 4
) -> dict[str, list[dict[str, Any]]]:
    """The five best answers to `count` queries in both directions, each with "hit": whether it is right; and to the
    `count` queries whose best answer is wrong by most.

    images (I, E), texts (T, E) and image_of_text (T,) come from `embed_pairs`. Returns {"text_to_image": [{"text",
    "answers": [{"image", "hit"}]}], "image_to_text": [{"image", "answers": [{"text", "hit"}]}]} and the same under
    "text_to_image_mistakes" and "image_to_text_mistakes".
    """
    captions = [caption for record in records for caption in record.captions]

    def images_for(text: int) -> dict[str, Any]:
        right = int(image_of_text[text])
        best = _top(images @ texts[text])
        answers = [{"image": thumbnail(records[j].image()), "hit": j == right} for j in best]
        return {"text": captions[text], "answers": answers}

    def texts_for(image: int) -> dict[str, Any]:
        best = _top(texts @ images[image])
        answers = [{"text": captions[t], "hit": int(image_of_text[t]) == image} for t in best]
        return {"image": thumbnail(records[image].image()), "answers": answers}

    chosen = spread(range(len(records)), count)
    owner = torch.arange(len(images))
    return {
        "text_to_image": [images_for(int((image_of_text == i).nonzero()[0])) for i in chosen],
        "image_to_text": [texts_for(i) for i in chosen],
        "text_to_image_mistakes": [images_for(t) for t in _mistakes(texts, image_of_text, images, owner, count)],
        "image_to_text_mistakes": [texts_for(i) for i in _mistakes(images, owner, texts, image_of_text, count)],
    }


def _mistakes(queries: Tensor, of_query: Tensor, answers: Tensor, of_answer: Tensor, count: int) -> list[int]:
    """The queries (Q, E) whose best wrong answer (A, E) is most above the best right one, at most one of each image.
    An answer is right if it belongs to the same image.
    """
    margins = []
    for part, owner in zip(queries.split(ROWS), of_query.split(ROWS), strict=True):
        similarity, right = part @ answers.T, owner[:, None] == of_answer  # (q, A)
        wrong, best = (similarity.masked_fill(mask, -torch.inf).amax(dim=1) for mask in (right, ~right))
        margins.append(wrong - best)
    found: dict[int, int] = {}  # image -> query: one for each image
    margin = torch.cat(margins)
    for query in margin.argsort(descending=True).tolist():
        if margin[query] <= 0 or len(found) == count:
            break
        found.setdefault(int(of_query[query]), query)
    return list(found.values())


def confusion_samples(
    records: Sequence[Record], names: Sequence[str], classified: Sequence[tuple[int, int, int]], count: int = 12
) -> list[dict[str, Any]]:
    """The `count` pairs of classes that are confused most often: {"class", "taken_for", "images", "of", "image"}: how
    many of the class's images, and one of them.

    Args:
        classified: number of the record, its class and the class that was found.
    """
    totals = Counter(label for _, label, _ in classified)
    pairs: dict[tuple[int, int], list[int]] = {}
    for i, label, found in sorted(classified):
        if label != found:
            pairs.setdefault((label, found), []).append(i)
    most = sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))[:count]
    return [
        {
            "class": names[label],
            "taken_for": names[found],
            "images": len(members),
            "of": totals[label],
            "image": thumbnail(records[members[0]].image()),
        }
        for (label, found), members in most
    ]


def picture(record: Record) -> Image.Image:
    """The image of a record; its images side by side if it has several."""
    images = [image() for image in record.images]
    if len(images) == 1:
        return images[0]
    gap = max(image.width for image in images) // 16
    height = max(image.height for image in images)
    width = sum(image.width + gap for image in images) - gap
    row = Image.new("RGB", (width, height), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row


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
    """At most `count` of the items, at equal distances from the first one on."""
    return items[:: max(len(items) // count, 1)][:count]


def _top(similarity: Tensor) -> list[int]:
    return torch.topk(similarity, min(TOP, len(similarity))).indices.tolist()


# Sheets: the samples as one picture, which every logger shows


def retrieval_sheet(
    records: Sequence[Record], images: Tensor, texts: Tensor, image_of_text: Tensor, count: int = 4
) -> Image.Image:
    """A strip for each query of `retrieval_samples`: first captions, each with the images found for it, then images,
    each with the captions found for it. Right answers are green and have a tick.
    """
    captions = [caption for record in records for caption in record.captions]
    queries = spread(range(len(records)), count)
    width = MARGIN + (TOP + 1) * (STRIP + MARGIN)
    height = 2 * LINE + STRIP + MARGIN
    sheet = Image.new("RGB", (width, 2 * (len(queries) * height + HEADING) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    how = "the best answers, best first; green with a tick: right"
    y = _head(draw, MARGIN, "Text to image", f"A caption, and below it {how}.")
    for i in queries:
        text = int((image_of_text == i).nonzero()[0])
        _write(draw, MARGIN, y, captions[text], INK, lines=1, width=120)
        for column, j in enumerate(_top(images @ texts[text])):
            left = MARGIN + column * (STRIP + MARGIN)
            top = y + LINE + 4
            _paste(sheet, records[j].image(), (left, top), STRIP)
            frame = (left - 3, top - 3, left + STRIP + 2, top + STRIP + 2)
            draw.rectangle(frame, outline=GREEN if j == i else GREY, width=3)
            if j == i:
                draw.rectangle((left, top, left + 18, top + LINE), fill="white")
                _tick(draw, left + 3, top + 3)
        y += height
    y = _head(draw, y, "Image to text", f"An image, and beside it {how}.")
    for i in queries:
        _paste(sheet, records[i].image(), (MARGIN, y), STRIP)
        for place, t in enumerate(_top(texts @ images[i])):
            left = 2 * MARGIN + STRIP
            top = y + place * (LINE + 4)
            right = int(image_of_text[t]) == i
            _write(draw, left + 18, top, captions[t], GREEN if right else GREY, lines=1, width=98)
            if right:
                _tick(draw, left, top + 2)
        y += height
    return sheet


def _head(draw: ImageDraw.ImageDraw, y: int, title: str, note: str) -> int:
    """Writes a heading; returns where the rest begins."""
    draw.text((MARGIN, y), title, fill=INK, font=ImageFont.load_default(size=16))
    draw.text((MARGIN, y + LINE + 4), note, fill=GREY, font=ImageFont.load_default(size=13))
    return y + HEADING


def _tick(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.line([(x, y + 6), (x + 4, y + 11), (x + 12, y)], fill=GREEN, width=2)


def _paste(sheet: Image.Image, picture: Image.Image, corner: tuple[int, int], edge: int) -> None:
    """The picture, its longer side `edge` pixels; small ones are enlarged without smoothing."""
    enlarge = Image.Resampling.NEAREST if max(picture.size) < edge / 2 else Image.Resampling.BICUBIC
    scale = edge / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    sheet.paste(picture.resize(size, enlarge), corner)


def sample_sheet(records: Sequence[Record], captions: Mapping[int | str, str], count: int = 12) -> Image.Image:
    """Picture of `count` images spread over the records. A caption that equals a reference is green and has a tick."""
    chosen = spread(records, count)
    rows = -(-len(chosen) // COLUMNS)
    height = CARD + 7 * LINE + MARGIN
    sheet = Image.new("RGB", (COLUMNS * (CARD + MARGIN) + MARGIN, rows * height + HEADING + MARGIN), "white")
    what = "Answers" if any(record.question for record in chosen) else "Captions"
    note = "Generated (green with a tick: equals a reference); below, in grey, references."
    draw = ImageDraw.Draw(sheet)
    start = _head(draw, MARGIN, what, note)
    for i, record in enumerate(chosen):
        corner = (MARGIN + i % COLUMNS * (CARD + MARGIN), start + i // COLUMNS * height)
        _paste(sheet, picture(record), corner, CARD)
        x = corner[0]
        y = corner[1] + CARD + 4
        y = _write(draw, x, y, record.question, INK, lines=2)
        caption = captions[record.id]
        exact = is_reference(caption, record.captions)
        if exact:
            _tick(draw, x, y + 2)
        y = _write(draw, x + 18 * exact, y, caption or "(empty)", GREEN if exact else INK, lines=3, width=38)
        for reference in list(dict.fromkeys(record.captions))[:2]:
            y = _write(draw, x, y, reference, GREY, lines=2)
    return sheet


def _write(
    draw: ImageDraw.ImageDraw, x: int, y: int, text: str, colour: tuple[int, int, int], lines: int, width: int = 40
) -> int:
    for line in textwrap.wrap(text, width=width, max_lines=lines, placeholder=" …"):
        draw.text((x, y), line, fill=colour, font=ImageFont.load_default(size=13))
        y += LINE
    return y + 2

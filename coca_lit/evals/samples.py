"""A sheet of sample captions as one picture: image, generated caption, references."""

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from coca_lit.data.records import Record

COLUMNS, CARD, MARGIN, LINE = 4, 260, 12, 17
INK, GREY, GREEN = (25, 25, 30), (120, 120, 128), (20, 120, 60)


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


def is_reference(caption: str, references: Sequence[str]) -> bool:
    """Whether a caption equals one of the references, apart from case, blanks and a closing full stop."""
    return _plain(caption) in {_plain(reference) for reference in references}


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(" .")

"""Draws `photos.png`, every photo of the package with the caption that the package's own model gives it, and
`search.png`, the photo that it finds for a text about each.

    python experiments/photos/picture.py

Wrong words are marked by hand below, by colour and a line. A caption that changes needs another look.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from coca_lit.data.transforms import build_transform
from coca_lit.models.inputs import Images
from coca_lit.weights.hub import PHOTOS_WEIGHTS
from coca_lit.weights.load import load_model

WRONG = {  # photo -> words of its caption that are wrong
    "astronaut": "man red shirt",
    "camera": "sitting swing",
    "cat": "person car",
    "coffee": "man sitting bench water",
    "raccoon": "man woman tree",
    "rocket": "group people standing beach",
    "stairs": "sitting skateboard ramp",
}
TEXTS = {  # photo -> a text about it
    "astronaut": "a woman in an orange suit smiles",
    "camera": "a man with a camera on a tripod",
    "cat": "a cat looks at the camera",
    "coffee": "a cup of coffee on a table",
    "raccoon": "an animal sits in the leaves",
    "rocket": "a rocket at night",
    "stairs": "people walk up the stairs",
}
SEARCH_KEY = (
    "The photo that the model in the package (20 MB) finds for each text. Underlined: not the one that was meant."
)
KEY = "Captions by the model that comes with coca_lit (20 MB, trained on 6,000 photos). Underlined: wrong."
SIDE, COLUMNS, GAP, SIZE = 210, 4, 10, 15  # of a cell, the sheet, its text
BLACK, RED = (30, 30, 30), (200, 0, 0)


def main() -> None:
    model = load_model("photos")
    transform = build_transform(**model.preprocessing)
    photos = {path.stem: Image.open(path).convert("RGB") for path in sorted(PHOTOS_WEIGHTS.parent.glob("*.jpg"))}
    images = torch.stack([as_pixels(transform(photo)) for photo in photos.values()])  # (7, 3, H, W)
    captions = [model.tokenizer.decode(caption) for caption in model.generate(images, strategy="beam")]
    for name, caption in zip(photos, captions, strict=True):
        print(f"{name}: {caption}")
    marked = [WRONG[name].split() for name in photos]
    draw_sheet(
        "photos.png", [*zip(photos.values(), captions, marked, strict=True), (None, KEY, ["Underlined:"])], lines=4
    )

    with torch.inference_mode():
        best = (model.encode_text(model.tokenizer([*TEXTS.values()])) @ model.encode_image(images).T).argmax(dim=1)
    found = [[*photos][i] for i in best.tolist()]
    cells = [
        (photos[hit], text, text.split() if hit != name else [])
        for hit, (name, text) in zip(found, TEXTS.items(), strict=True)
    ]
    draw_sheet("search.png", [*cells, (None, SEARCH_KEY, ["Underlined:"])], lines=2)


def as_pixels(images: Images) -> Tensor:
    assert isinstance(images, Tensor)
    return images


def draw_sheet(name: str, cells: Sequence[tuple[Image.Image | None, str, list[str]]], lines: int) -> None:
    """Cells of a photo, what stands below it on at most so many lines, and the words to mark."""
    rows = -(-len(cells) // COLUMNS)
    high = SIDE + lines * (SIZE + 4) + 2 * GAP
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * high + GAP), "white")
    for number, (photo, text, wrong) in enumerate(cells):
        x, y = GAP + number % COLUMNS * (SIDE + GAP), GAP + number // COLUMNS * high
        if photo is not None:
            sheet.paste(ImageOps.fit(photo, (SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        write(ImageDraw.Draw(sheet), x, y + (SIDE if photo is not None else SIDE // 2) + 6, text, wrong)
    sheet.quantize(256).save(Path(__file__).with_name(name), optimize=True)


def write(draw: ImageDraw.ImageDraw, left: int, y: int, text: str, wrong: list[str]) -> None:
    """Words from the left, on as many lines as they need."""
    font, x = ImageFont.load_default(size=SIZE), left
    for word in text.split():
        width = int(draw.textlength(word, font))
        if x + width > left + SIDE and x > left:
            x, y = left, y + SIZE + 4
        draw.text((x, y), word, RED if word in wrong else BLACK, font)
        if word in wrong:
            draw.line((x, y + SIZE + 3, x + width, y + SIZE + 3), RED, 2)
        x += width + 5


if __name__ == "__main__":
    main()

"""Draws `photos.png`: every photo of the package, none chosen, with the caption that the package's own model gives it,
and a text about it by hand, marked where the model finds another photo for the text.

    python experiments/photos/picture.py

Wrong words of captions are marked by hand below, by colour and a line. A caption that changes needs another look.
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
KEY = (
    "All photos in the package. Black: captions by the model that comes with it (20 MB, trained on 6,000 photos). "
    "Grey: texts to search with. Underlined: wrong words, and a text that finds another photo."
)
SIDE, COLUMNS, GAP, SIZE = 210, 4, 10, 15  # of a cell, the sheet, its text
BLACK, GREY, RED = (30, 30, 30), (110, 110, 110), (200, 0, 0)
LINES = 5  # of text below a photo

Text = tuple[str, list[str], tuple[int, int, int]]  # words, those to mark, and the colour of the others


def main() -> None:
    model = load_model("photos")
    transform = build_transform(**model.preprocessing)
    photos = {path.stem: Image.open(path).convert("RGB") for path in sorted(PHOTOS_WEIGHTS.parent.glob("*.jpg"))}
    images = torch.stack([as_pixels(transform(photo)) for photo in photos.values()])  # (7, 3, H, W)
    captions = [model.tokenizer.decode(caption) for caption in model.generate(images, strategy="beam")]
    for name, caption in zip(photos, captions, strict=True):
        print(f"{name}: {caption}")
    with torch.inference_mode():
        best = (model.encode_text(model.tokenizer([*TEXTS.values()])) @ model.encode_image(images).T).argmax(dim=1)
    found = [[*photos][i] for i in best.tolist()]  # by the text about each photo
    cells: list[tuple[Image.Image | None, list[Text]]] = []
    for name, caption, hit in zip(photos, captions, found, strict=True):
        text = TEXTS[name]
        cells.append(
            (photos[name], [(caption, WRONG[name].split(), BLACK), (text, text.split() if hit != name else [], GREY)])
        )
    draw_sheet("photos.png", [*cells, (None, [(KEY, ["Underlined:"], BLACK)])])


def as_pixels(images: Images) -> Tensor:
    assert isinstance(images, Tensor)
    return images


def draw_sheet(name: str, cells: Sequence[tuple[Image.Image | None, list[Text]]]) -> None:
    """Cells of a photo and the texts below it."""
    rows = -(-len(cells) // COLUMNS)
    high = SIDE + LINES * (SIZE + 4) + 2 * GAP
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * high), "white")
    for number, (photo, texts) in enumerate(cells):
        x, y = GAP + number % COLUMNS * (SIDE + GAP), GAP + number // COLUMNS * high
        if photo is not None:
            sheet.paste(ImageOps.fit(photo, (SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        y += (SIDE if photo is not None else SIDE // 3) + 6
        for text in texts:
            y = write(ImageDraw.Draw(sheet), x, y, text)
    sheet.quantize(256).save(Path(__file__).with_name(name), optimize=True)


def write(draw: ImageDraw.ImageDraw, left: int, y: int, text: Text) -> int:
    """Words from the left, on as many lines as they need; returns where the next text goes."""
    words, marked, colour = text
    font, x = ImageFont.load_default(size=SIZE), left
    for word in words.split():
        width = int(draw.textlength(word, font))
        if x + width > left + SIDE and x > left:
            x, y = left, y + SIZE + 4
        draw.text((x, y), word, RED if word in marked else colour, font)
        if word in marked:
            draw.line((x, y + SIZE + 3, x + width, y + SIZE + 3), RED, 2)
        x += width + 5
    return y + SIZE + 8


if __name__ == "__main__":
    main()

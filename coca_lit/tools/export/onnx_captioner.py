"""Captions from exported graphs with NumPy and ONNX Runtime alone (Pillow reads the photos):

    python captioner.py photo.jpg
    python captioner.py first.jpg second.jpg … (of one input, if the graphs take several: "pictures" in config.json)

`image_encoder.onnx` is run once per batch of images. `decoder.onnx` is run once per token: it takes the new tokens,
the image's keys and values, and the cache of what was read before, and returns logits and the longer cache.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]


class Captioner:
    """Writes the likeliest token each time (greedy)."""

    def __init__(self, folder: str | Path, providers: tuple[str, ...] = ("CPUExecutionProvider",)) -> None:
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.token_bytes = [token.encode("latin-1") for token in json.loads((folder / "tokens.json").read_text())]
        self._image_encoder, self._decoder = (
            onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=list(providers))
            for name in ("image_encoder", "decoder")
        )
        self._cache_shape = next(x.shape for x in self._decoder.get_inputs() if x.name == "past_keys")

    def write(self, images: Array, max_length: int | None = None) -> Array:
        """images (B, 3, H, W) uint8, or (B, P, 3, H, W) of P pictures each, -> ids (B, L), padded, each row ended by
        the end id.
        """
        batch = len(images)
        length = max_length or self.config["max_length"]
        if not 2 <= length <= self.config["context_length"]:
            raise ValueError(f"max_length must lie between 2 and {self.config['context_length']}, got {length}")
        start, end, pad = (self.config[name] for name in ("start_id", "end_id", "pad_id"))
        _, image_keys, image_values = self._image_encoder.run(None, {"images": images})
        layers, _, heads, _, width = self._cache_shape
        keys = values = np.zeros((layers, batch, heads, 0, width), np.float32)
        ids = np.full((batch, length), pad, np.int64)
        ids[:, 0] = start
        ended = np.zeros(batch, bool)
        for position in range(1, length):
            logits, keys, values = self._decoder.run(
                None,
                {
                    "tokens": ids[:, position - 1 : position],
                    "image_keys": image_keys,
                    "image_values": image_values,
                    "past_keys": keys,
                    "past_values": values,
                },
            )
            chosen = np.full(batch, end) if position == length - 1 else logits.argmax(axis=-1)
            ids[:, position] = np.where(ended, pad, chosen)
            ended |= chosen == end
            if ended.all():
                break
        return ids

    def decode(self, ids: Array) -> str:
        """ids (L,) -> the text before the end id."""
        row = ids.tolist()
        row = row[: row.index(self.config["end_id"])] if self.config["end_id"] in row else row
        return b"".join(self.token_bytes[i] for i in row).decode("utf-8", errors="replace").strip()

    def read_image(self, path: str | Path) -> Array:
        """The photo (3, H, W) as the model saw its training images: as a rule the short side resized, then the
        centre.
        """
        from PIL import Image, ImageOps

        size = self.config["image_size"]
        mode = self.config["resize_mode"]
        # Of no other format: Pillow would run Ghostscript on an EPS.
        image = ImageOps.exif_transpose(Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "GIF")))
        if image.mode.startswith("I"):  # 16 bits of grey, of which Pillow would cut off all above 255
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        image = image.convert("RGB")
        if mode == "squash":
            width = size
            height = size
        elif mode == "longest":  # and black beside it
            width, height = (max(round(side / (max(image.size) / size)), 1) for side in image.size)
        else:
            width, height = (int(size * side / min(image.size)) for side in image.size)
        resized = image.resize((width, height), Image.Resampling[self.config["interpolation"].upper()])
        if mode == "longest":
            left = -((size - width) // 2)
            top = -((size - height) // 2)
        else:
            left = round((width - size) / 2)
            top = round((height - size) / 2)
        return np.asarray(resized.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


if __name__ == "__main__":
    names = sys.argv[1:]
    if not names:
        sys.exit(__doc__)
    captioner = Captioner(Path(__file__).parent)
    count = captioner.config["pictures"]
    if count:
        if len(names) != count:
            sys.exit(f"error: the graphs take {count} pictures at a time, got {len(names)}")
        try:
            pictures = np.stack([captioner.read_image(name) for name in names])
        except Exception as error:
            sys.exit(f"error: a picture cannot be read: {error}")
        print(f"{' '.join(names)}\t{captioner.decode(captioner.write(pictures[None])[0])}")
        names = []
    written = 0
    for start in range(0, len(names), 16):
        photos: list[tuple[str, Array]] = []
        for name in names[start : start + 16]:
            try:
                photos.append((name, captioner.read_image(name)))
            except Exception as error:  # Pillow raises a dozen types
                print(f"skipped: {name}: {error}", file=sys.stderr)
        if photos:
            rows = captioner.write(np.stack([pixels for _, pixels in photos]))
            written += len(rows)
            for (name, _), row in zip(photos, rows, strict=True):
                print(f"{name}\t{captioner.decode(row)}")
    if names and not written:
        sys.exit(1)

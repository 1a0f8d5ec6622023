"""Captions of twenty photos that were drawn at random from Flickr8k's validation split, beside what a person wrote.

python experiments/photos/drawn.py FLICKR8K_FOLDER
"""

import argparse
import json
import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from coca_lit.data.transforms import build_transform
from coca_lit.weights.load import load_model
from experiments.benchmarks.record import provenance
from experiments.study import write_rows

COUNT, SEED = 20, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    model = load_model("photos")
    transform = build_transform(**model.preprocessing)
    rows = []
    for name, truth in drawn(folder / "dataset_flickr8k.json"):
        image = transform(Image.open(folder / "images" / name).convert("RGB"))
        assert isinstance(image, Tensor)
        caption = model.generate(torch.stack([image]), strategy="beam")[0]
        rows.append(
            {"photo": name, "caption by the model": model.tokenizer.decode(caption), "first caption by a person": truth}
        )
        print(rows[-1])
    write_rows(Path(__file__).with_suffix(".csv"), [row | provenance() for row in rows])


def drawn(annotations: Path) -> list[tuple[str, str]]:
    """Names of photos, each with the first of its five captions."""
    entries = [entry for entry in json.loads(annotations.read_text())["images"] if entry["split"] == "val"]
    chosen = random.Random(SEED).sample(entries, COUNT)
    return [(entry["filename"], entry["sentences"][0]["raw"].strip()) for entry in chosen]


if __name__ == "__main__":
    main()

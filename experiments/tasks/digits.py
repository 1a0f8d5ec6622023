"""Writes scikit-learn's 1,797 digits as a folder per class in train/ and val/, every third one into val/.

python experiments/tasks/digits.py OUT
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 64  # pixels; the originals have 8


def main() -> None:
    out, data = Path(sys.argv[1]), load_digits()
    for i, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        folder = out / ("val" if i % 3 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).resize((SIZE, SIZE)).save(folder / f"{i}.png")


if __name__ == "__main__":
    main()

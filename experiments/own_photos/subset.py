"""Lays out a part of Flickr8k as a stranger's folder: photos and a captions.csv.

    python experiments/own_photos/subset.py FLICKR8K OUTPUT PHOTOS

The first nine tenths of the photos come from the training split and the rest from the validation split, and
captions.csv says so; none is of the test split. Which ones is drawn with a fixed seed, so that smaller parts are within
larger ones.
"""

import csv
import json
import random
import shutil
import sys
from pathlib import Path


def main(flickr: Path, output: Path, count: int) -> None:
    images = json.loads((flickr / "dataset_flickr8k.json").read_text())["images"]
    images = [image for image in images if (flickr / "images" / image["filename"]).is_file()]
    output.mkdir(parents=True)
    with (output / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption", "split"])
        for split, part in (("train", count - count // 10), ("val", count // 10)):
            photos = [image for image in images if image["split"] == split]
            random.Random(0).shuffle(photos)
            for image in photos[:part]:
                shutil.copy(flickr / "images" / image["filename"], output)
                writer.writerows([image["filename"], sentence["raw"], split] for sentence in image["sentences"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

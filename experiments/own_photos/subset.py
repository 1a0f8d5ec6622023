"""Lays out a part of Flickr8k as a stranger's folder: photos and a captions.csv.

    python experiments/own_photos/subset.py FLICKR8K OUTPUT PHOTOS [--unseen]

The first nine tenths of the photos come from the training split and the rest from the validation split, and
captions.csv says so; none is of the test split. Which ones is drawn with a fixed seed, so that smaller parts are within
larger ones.

The package's own model was trained on the training split. With --unseen the photos to train on come from the validation
split as far as it goes, which is 900 photos, and the same 100 others of it are scored whatever the number.
"""

import csv
import json
import random
import shutil
import sys
from pathlib import Path

SCORED = 100  # photos, with --unseen


def main(flickr: Path, output: Path, count: int, unseen: bool) -> None:
    images = json.loads((flickr / "dataset_flickr8k.json").read_text())["images"]
    images = [image for image in images if (flickr / "images" / image["filename"]).is_file()]
    output.mkdir(parents=True)
    with (output / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption", "split"])
        of_split: dict[str, list[dict]] = {}
        for split in ("train", "val"):
            of_split[split] = [image for image in images if image["split"] == split]
            random.Random(0).shuffle(of_split[split])
        train, val = of_split["train"], of_split["val"]
        scored = count // 10
        if unseen:
            scored = SCORED
            train = val[SCORED:] + train
        for split, photos in (("train", train[: count - count // 10]), ("val", val[:scored])):
            for image in photos:
                shutil.copy(flickr / "images" / image["filename"], output)
                writer.writerows([image["filename"], sentence["raw"], split] for sentence in image["sentences"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["--unseen"])

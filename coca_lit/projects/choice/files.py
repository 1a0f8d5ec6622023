"""Image-text choice: SugarCrepe, SugarCrepe++ and Winoground in their original files.

The captions of a record are the right text and then the wrong ones; the kind of the case is its domain.
"""

import random
from pathlib import Path

from coca_lit.data.datasets.annotations import MAX_BYTES, find_file, listing, read_json_lines, schema
from coca_lit.data.records import Listing, Record, records_on_disk
from coca_lit.reading import read_json

SUGARCREPE = ("add_obj", "add_att", "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att")
SUGARCREPE_PP = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att")


def sugarcrepe_records(root: str | Path, images: str | Path | None = None) -> list[Record]:
    """SugarCrepe (Hsieh et al. 2023, arXiv 2306.14610): seven kinds of small changes that make a caption wrong.

    Args:
        root: folder with add_obj.json … swap_att.json, or with these in data/, as in the repository sugar-crepe:
            {"0": {"filename", "caption", "negative_caption"}, …}.
        images: COCO's val2017, or the folder that holds it; by default in `root`.
    """
    root = Path(root)
    listings: list[Listing] = []
    for kind in SUGARCREPE:
        candidates = [root / f"{kind}.json", root / "data" / f"{kind}.json"]
        path = find_file("the captions of SugarCrepe", candidates, "copy data/ of the repository sugar-crepe there")
        content = read_json(path, dict, MAX_BYTES)
        with schema(path, "SugarCrepe's"):
            listings += [
                listing(f"{kind}/{key}", case["filename"], (case["caption"], case["negative_caption"]), kind)
                for key, case in content.items()
            ]
    return _with_images(listings, root, images)


def sugarcrepe_pp_records(root: str | Path, images: str | Path | None = None) -> list[Record]:
    """SugarCrepe++ (Dumpala et al. 2024, arXiv 2406.11171): two right captions with different words, and a wrong one.
    For `ChoiceScores(right=2)`.

    Args:
        root: folder with swap_obj.json … replace_rel.json, or with these in data/, as in the repository scpp:
            [{"id", "filename", "caption", "caption2", "negative_caption"}, …].
        images: COCO's val2017, or the folder that holds it; by default in `root`.
    """
    root = Path(root)
    listings: list[Listing] = []
    for kind in SUGARCREPE_PP:
        candidates = [root / f"{kind}.json", root / "data" / f"{kind}.json"]
        path = find_file("the captions of SugarCrepe++", candidates, "copy data/ of the repository scpp there")
        content = read_json(path, list, MAX_BYTES)
        with schema(path, "SugarCrepe++'s"):
            for case in content:
                texts = case["caption"], case["caption2"], case["negative_caption"]
                listings.append(listing(f"{kind}/{case['id']}", case["filename"], texts, kind))
    return _with_images(listings, root, images)


def _with_images(listings: list[Listing], root: Path, images: str | Path | None) -> list[Record]:
    random.Random(0).shuffle(listings)  # so that the first few, which quick scores take, are of all kinds
    places = [Path(images)] if images is not None else []
    folders = [base / name for base in (*places, root) for name in ("val2017", ".")]
    return records_on_disk(listings, folders, root, "name COCO's val2017 by records.images")


def winoground_records(root: str | Path) -> list[Record]:
    """Winoground (Thrush et al. 2022, arXiv 2204.03162): pairs of images that follow each other, each with its own
    caption and that of the other image. For `ChoiceScores(paired=True)`.

    Args:
        root: folder with examples.jsonl and images/ (unpacked images.zip), or data/ with both, as on the Hub.
    """
    root = Path(root)
    how = "copy data/ of the Hub's data set facebook/winoground there and unpack images.zip"
    candidates = [root / "examples.jsonl", root / "data" / "examples.jsonl"]
    path = find_file("the examples of Winoground", candidates, how)
    listings: list[Listing] = []
    with schema(path, "Winoground's"):
        for case in read_json_lines(path):
            texts = case["caption_0"], case["caption_1"]
            for i in (0, 1):
                name = case[f"image_{i}"]
                listings.append(listing(f"{case['id']}/{i}", f"{name}.png", (texts[i], texts[1 - i])))
    records = {record.id: record for record in records_on_disk(listings, [path.parent / "images"], path, how)}
    pairs = [(first.id, second.id) for first, second in zip(listings[::2], listings[1::2], strict=True)]
    return [records[id] for pair in pairs if all(id in records for id in pair) for id in pair]

"""Image-text choice: SugarCrepe, Winoground and ARO in their original files.

The captions of a record are the right text and then the wrong ones; the kind of the case is its domain.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from PIL import Image

from coca_lit.data.datasets.annotations import MAX_BYTES, first_file, listing, read_json_lines, schema
from coca_lit.data.datasets.coco import FOLDERS
from coca_lit.data.records import ImageFile, Listing, Record, not_found, open_image, records_on_disk
from coca_lit.errors import DataError
from coca_lit.reading import is_int64, read_json, texts_of

SUGARCREPE = ("add_obj", "add_att", "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att")
MAX_WORDS = 30  # of a caption of ARO's order tests, as in the original
MAX_KIND = 40  # characters of the name of a relation or of attributes
NOUNS, ADJECTIVES = ("NN", "NNS", "NNP", "NNPS"), ("JJ", "JJR", "JJS")  # tags of the Penn treebank
TOKEN = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
Tagger = Callable[[str], Sequence[tuple[str, str]]]  # a text -> its tokens with their tags


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
        path = first_file(candidates)
        if path is None:
            raise not_found("the captions of SugarCrepe", candidates, "copy data/ of the repository sugar-crepe there")
        content = read_json(path, dict, MAX_BYTES)
        with schema(path, "SugarCrepe's"):
            listings += [
                listing(f"{kind}/{key}", case["filename"], (case["caption"], case["negative_caption"]), kind)
                for key, case in content.items()
            ]
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
    path = first_file([root / "examples.jsonl", root / "data" / "examples.jsonl"])
    if path is None:
        raise not_found("the examples of Winoground", [root / "examples.jsonl", root / "data"], how)
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


@dataclass(frozen=True)
class Crop:
    """A box of an image on disk: called, it decodes that part."""

    path: Path
    box: tuple[int, int, int, int]  # left, top, width, height

    def __call__(self) -> Image.Image:
        image = open_image(self.path)
        x, y, width, height = self.box
        right, bottom = min(x + width, image.width), min(y + height, image.height)
        if not (0 <= x < right and 0 <= y < bottom):
            raise DataError(f"the box {self.box} does not lie in {self.path} of {image.width} x {image.height} pixels")
        return image.crop((x, y, right, bottom))


def aro_records(root: str | Path, task: Literal["relation", "attribution"]) -> list[Record]:
    """Visual Genome Relation or Attribution of ARO (Yüksekgönül et al. 2023, arXiv 2210.01936): objects or attributes
    change places. The part of the image that the caption is about is cut out.

    Args:
        root: folder with visual_genome_relation.json and visual_genome_attribution.json, and the images in images/.
    """
    path = Path(root) / f"visual_genome_{task}.json"
    how = "put ARO's visual_genome_relation.json, visual_genome_attribution.json and images/ into one folder"
    if not path.is_file():
        raise not_found(f"visual genome {task} of ARO", [path], how)
    content = read_json(path, list, MAX_BYTES)
    listings: list[Listing] = []
    boxes: dict[int | str, tuple[int, int, int, int]] = {}
    with schema(path, "ARO's"):
        for i, case in enumerate(content):
            kind = case["relation_name"] if task == "relation" else "_".join(case["attributes"])
            texts = case["true_caption"], case["false_caption"]
            listings.append(listing(i, case["image_path"], texts, re.sub(r"\W+", "_", kind)[:MAX_KIND]))
            boxes[i] = _box([case[f"bbox_{side}"] for side in "xywh"])
    records = records_on_disk(listings, [Path(root) / "images"], path, how)
    return [record._replace(image=Crop(cast(ImageFile, record.image).path, boxes[record.id])) for record in records]


def _box(values: list[Any]) -> tuple[int, int, int, int]:
    if not all(map(is_int64, values)):
        raise TypeError(f"expected a box of whole numbers, got {values!r:.80}")
    x, y, width, height = values
    return x, y, width, height


def aro_order_records(
    root: str | Path, name: Literal["coco", "flickr30k"], split: str = "test", tag: Tagger | None = None
) -> list[Record]:
    """COCO-Order or Flickr30k-Order of ARO: each caption against four orders of its own words.

    The original draws the orders at random each time; here they depend on the caption alone. Words are split by a
    pattern instead of NLTK. An order that leaves the caption as it was is no rival.

    Args:
        root: folder with coco_karpathy_test.json or flickr30k_test.json, [{"image": "val2014/NAME.jpg", "caption":
            […]}], as BLIP distributes them, and the images in the folder named there, or in images/.
        tag: tags of the Penn treebank for each token; None for spaCy's en_core_web_sm, as in the original.

    Raises:
        DataError: there is no spaCy, or not its model.
    """
    root, tag = Path(root), tag or _spacy()
    path = root / (f"coco_karpathy_{split}.json" if name == "coco" else f"flickr30k_{split}.json")
    how = f"put BLIP's {path.name} and the folder of images that it names into one folder"
    if not path.is_file():
        raise not_found(f"the captions of {name}", [path], how)
    listings: list[Listing] = []
    with schema(path, "BLIP's"):
        for i, image in enumerate(read_json(path, list, MAX_BYTES)):
            file = PurePosixPath(image["image"]).name
            for j, text in enumerate(texts_of(image["caption"])):
                listings.append(listing(f"{i}/{j}", file, (plain_words(text), *orders(text, tag))))
    folders = [base / sub for base in (root, root / "images") for sub in (*FOLDERS, "flickr30k-images")]
    return records_on_disk(listings, folders, path, how)


def orders(text: str, tag: Tagger) -> list[str]:
    """Four orders of the words of a caption, without those that leave it as it is: nouns among themselves and
    adjectives among themselves, all other words, words within each group of three, groups of three words.
    """
    rng, tagged, tokens = random.Random(text), tag(text), TOKEN.findall(text)
    words = [word for word, _ in tagged]
    nouns = [i for i, (_, kind) in enumerate(tagged) if kind in NOUNS]
    adjectives = [i for i, (_, kind) in enumerate(tagged) if kind in ADJECTIVES]
    others = [i for i in range(len(words)) if i not in {*nouns, *adjectives}]
    triples = [tokens[i : i + 3] for i in range(0, len(tokens), 3)]
    mixed = [
        _shuffled(_shuffled(words, nouns, rng), adjectives, rng),
        _shuffled(words, others, rng),
        [word for triple in triples for word in rng.sample(triple, len(triple))],
        [word for triple in rng.sample(triples, len(triples)) for word in triple],
    ]
    found = [plain_words(" ".join(order)) for order in mixed]
    return [order for order in found if order != plain_words(text)]


def _shuffled(words: Sequence[str], places: Sequence[int], rng: random.Random) -> list[str]:
    """The words with those at some places in another order."""
    result = list(words)
    for place, source in zip(places, rng.sample(places, len(places)), strict=True):
        result[place] = words[source]
    return result


def plain_words(text: str) -> str:
    """As BLIP cleans captions: lower case, without some punctuation marks, `MAX_WORDS` words at most."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:MAX_WORDS])


@cache
def _spacy() -> Tagger:
    try:
        import spacy

        parse = spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise DataError(
            "ARO's order tests tell nouns and adjectives by spaCy's small English model: pip install spacy, "
            "python -m spacy download en_core_web_sm"
        ) from error
    return lambda text: [(token.text, token.tag_) for token in parse(text)]

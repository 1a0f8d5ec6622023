"""Zero-shot scores on many data sets in CLIP_benchmark's layout of shards: of a folder, or its own ones on the Hub.

    classnames.txt  zeroshot_classification_templates.txt  test/nshards.txt  test/0.tar  test/1.tar …

The samples of a shard are KEY.webp (or .jpg, .png) with KEY.cls, the number of the class. Data sets of captions have
KEY.txt instead, a caption in each line, and "retrieval" in a file dataset_type.txt. Nothing is unpacked.
"""

import logging
import random
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from coca_lit.data.datasets.classification import Classification
from coca_lit.data.inputs import IMAGES
from coca_lit.data.pixels import MAX_IMAGE, decode_image
from coca_lit.data.records import Record, not_found
from coca_lit.data.shards.sample import MAX_TEXT
from coca_lit.data.shards.tar import tar_members
from coca_lit.errors import DataError
from coca_lit.evals.base import Evaluation
from coca_lit.evals.classification import ZeroShotScores
from coca_lit.evals.retrieval import RetrievalScores
from coca_lit.reading import MAX_JSON, read_bounded

log = logging.getLogger(__name__)

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
TYPE = "dataset_type.txt"
MAX_SHARDS = 100_000
HUB = re.compile(r"(?:hf://|https://huggingface\.co/)datasets/([\w.-]+/[\w.-]+?)(?:(?:@|/tree/)([\w.-]+))?/?")
HOW = "expected the webdataset layout of CLIP_benchmark, which clip_benchmark_export_wds writes"
# What CLIP_benchmark's webdatasets.txt lists, as NAME of hf://datasets/clip-benchmark/wds_NAME.
ON_HUB = (
    *("mscoco_captions", "flickr8k", "flickr30k", "imagenet1k", "imagenetv2", "imagenet_sketch", "imagenet-a"),
    *("imagenet-r", "imagenet-o", "objectnet", "fer2013", "voc2007", "sun397", "cars", "fgvc_aircraft", "mnist"),
    *("stl10", "gtsrb", "country211", "renderedsst2", "vtab/caltech101", "vtab/cifar10", "vtab/cifar100"),
    *("vtab/clevr_count_all", "vtab/clevr_closest_object_distance", "vtab/diabetic_retinopathy", "vtab/dmlab"),
    *("vtab/dsprites_label_orientation", "vtab/dsprites_label_x_position", "vtab/dsprites_label_y_position"),
    *("vtab/dtd", "vtab/eurosat", "vtab/kitti_closest_vehicle_distance", "vtab/flowers", "vtab/pets", "vtab/pcam"),
    *("vtab/resisc45", "vtab/smallnorb_label_azimuth", "vtab/smallnorb_label_elevation", "vtab/svhn"),
)


def clip_benchmark(
    root: str | Path, datasets: Sequence[str] | None = None, split: str = "test", every: int = 0
) -> list[Evaluation]:
    """An evaluation of each data set, named as that with "-" for "/": accuracy of classes, recall of captions.

    Args:
        root: folder of the data sets, or "hf://datasets/ORG", whose data sets are called wds_NAME there.
        datasets: their names, such as [imagenet1k, vtab/caltech101]; None for all in the folder, or all of `ON_HUB`.

    Raises:
        DataNotFoundError, DataError: as `classified_shards`.
    """
    remote = "://" in str(root)
    names = datasets if datasets is not None else ON_HUB
    if datasets is None and not remote:  # with class names or a type; also within folders, such as vtab/caltech101
        marks = [f"{depth}/{name}" for depth in ("*", "*/*") for name in (CLASS_NAMES, TYPE)]
        names = sorted({path.parent.relative_to(root).as_posix() for mark in marks for path in Path(root).glob(mark)})
    if not names:
        raise not_found("data sets", [root], HOW)
    evaluations: list[Evaluation] = []
    for name in names:
        flat = name.replace("/", "-")
        folder = local_copy(f"{str(root).rstrip('/')}/wds_{flat}" if remote else Path(root, name), split)
        if kind_of(folder) == "retrieval":
            evaluations.append(RetrievalScores(flat, captioned_shards(folder, split), every=every))
        else:
            evaluations.append(ZeroShotScores(flat, classified_shards(folder, split), every=every))
    return evaluations


@dataclass(frozen=True)
class TarImage:
    """An image within a tar: called, it decodes these bytes."""

    tar: Path
    offset: int
    size: int

    def __call__(self) -> Image.Image:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return decode_image(
                file.read(min(self.size, MAX_IMAGE + 1)), f"the image at byte {self.offset} of {self.tar}"
            )


def kind_of(root: Path) -> str:
    """ "classification", "retrieval" or "multilabel"."""
    if not (root / TYPE).is_file():
        return "classification"
    return _text(root / TYPE).strip().lower()


def classified_shards(root: str | Path, split: str = "test") -> Classification:
    """The images of a split with their classes.

    Args:
        root: a folder, or a data set on the Hub, "hf://datasets/ORG/NAME" or "…@REVISION", see `local_copy`.

    Raises:
        DataNotFoundError: there is no such data set, or a shard is missing.
        DataError: a file of it cannot be used.
    """
    root = local_copy(root, split)
    kind = kind_of(root)
    if kind != "classification":
        raise DataError(f"expected one class per image, but {root / TYPE} says {kind}")
    names = _lines(root / CLASS_NAMES)
    templates = _lines(root / TEMPLATES)
    wrong = [template for template in templates if "{c}" not in template]
    if wrong:
        raise DataError(f"{root / TEMPLATES}: each line must hold {{c}} for the name of the class, got {wrong[0]!r}")
    samples = [*_samples(root / split, "cls")]
    random.Random(0).shuffle(samples)
    labels: dict[Hashable, int] = {
        id: _number(text, len(names), f"class of {id} in {root / split}") for id, _, text in samples
    }
    records = [Record(id, image) for id, image, _ in samples]
    prompts = tuple(template.replace("{c}", "{}") for template in templates)
    return Classification(records, labels, tuple(names), prompts)


def captioned_shards(root: str | Path, split: str = "test") -> list[Record]:
    """The images of a split with all their captions, without those that have none; arguments and errors as in
    `classified_shards`.
    """
    root = local_copy(root, split)
    kind = kind_of(root)
    if kind != "retrieval":
        raise DataError(f"expected captions (retrieval in {root / TYPE}), but the data set is one of {kind}")
    records = [Record(id, image, text.splitlines()) for id, image, text in _samples(root / split, "txt")]
    captioned = [record for record in records if record.captions]
    if not captioned:
        raise DataError(f"{root / split} has no caption for any of its {len(records)} images")
    if len(captioned) < len(records):
        skipped = len(records) - len(captioned)
        log.warning("skipped %d of %d images without a caption in %s", skipped, len(records), root / split)
    return captioned


def local_copy(root: str | Path, split: str) -> Path:
    """The folder itself; of a data set on the Hub, the copy of the split in the cache of huggingface_hub, downloaded if
    it is not there. `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` work as always.
    """
    if "://" not in str(root):
        return Path(root)
    on_hub = HUB.fullmatch(str(root))
    if on_hub is None:
        raise DataError(f"{root} is neither a folder nor a data set on the Hub, hf://datasets/ORG/NAME")
    from huggingface_hub import snapshot_download

    repository, revision = on_hub.groups()
    try:
        return Path(
            snapshot_download(
                repository, repo_type="dataset", revision=revision, allow_patterns=["*.txt", f"{split}/*"]
            )
        )
    except (OSError, ValueError) as error:  # of the Hub: no such data set, no access, no network
        raise not_found(f"data set {repository}", [root], str(error).strip().splitlines()[0]) from error


def _samples(folder: Path, label: str) -> Iterator[tuple[str, TarImage, str]]:
    """(id, image, content of KEY.`label`) of each sample in the shards of a split, in their order."""
    if not (folder / "nshards.txt").is_file():
        raise not_found("shards", [folder / "nshards.txt"], HOW)
    count = _number(_text(folder / "nshards.txt"), MAX_SHARDS, f"number of shards in {folder / 'nshards.txt'}")
    if not count:
        raise DataError(f"{folder / 'nshards.txt'} says that there are no shards: {HOW}")
    for shard in (folder / f"{i}.tar" for i in range(count)):
        if not shard.is_file():
            raise not_found(f"one of {count} shards", [shard], HOW)
        images: dict[str, TarImage] = {}
        texts: dict[str, str] = {}
        try:
            for member in tar_members(shard, lambda name: MAX_TEXT if name.lower().endswith(f".{label}") else 0):
                place, slash, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key = f"{place}{slash}{stem}"
                if suffix.lower() in IMAGES.suffixes:
                    images[key] = TarImage(shard, member.offset, member.size)
                elif suffix.lower() == label and member.size <= MAX_TEXT:
                    texts[key] = member.content.decode()
        except Exception as error:  # tarfile raises many types
            raise DataError(f"{shard} is not a readable shard: {error}") from error
        if images.keys() != texts.keys():
            raise DataError(f"{shard}: sample {min(images.keys() ^ texts.keys())} lacks its image or its .{label}")
        if not images:
            raise DataError(f"{shard} holds no images with .{label}")
        yield from ((f"{shard.stem}/{key}", image, texts[key]) for key, image in images.items())


def _number(text: str, limit: int, what: str) -> int:
    text = text.strip()
    if len(text) > 9 or not text.isdecimal() or int(text) >= limit:
        raise DataError(f"the {what} must be a whole number below {limit}, got {text[:40]!r}")
    return int(text)


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _text(path).splitlines()]
    if not lines:
        raise DataError(f"{path} is empty")
    return lines


def _text(path: Path) -> str:
    if not path.exists():
        raise not_found(path.name, [path], HOW)
    try:
        return read_bounded(path, MAX_JSON, "cannot be read").decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read: {error}") from error

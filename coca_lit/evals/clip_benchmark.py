"""Zero-shot scores on many data sets: a folder of those in CLIP_benchmark's layout, or its own ones on the Hub."""

from collections.abc import Sequence
from pathlib import Path

from coca_lit.data.datasets.clip_benchmark import (
    CLASS_NAMES,
    HOW,
    TYPE,
    captioned_shards,
    classified_shards,
    kind_of,
    local_copy,
)
from coca_lit.data.records import not_found
from coca_lit.evals.base import Evaluation
from coca_lit.evals.retrieval import RetrievalScores
from coca_lit.evals.zeroshot import ZeroShotScores

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
    names = datasets if datasets is not None else ON_HUB if remote else _in_folder(Path(root))
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


def _in_folder(root: Path) -> list[str]:
    """Folders with class names or a type, and those within folders, such as vtab/caltech101."""
    marks = [f"{depth}/{name}" for depth in ("*", "*/*") for name in (CLASS_NAMES, TYPE)]
    return sorted({path.parent.relative_to(root).as_posix() for mark in marks for path in root.glob(mark)})

"""Any folder of images with a file of captions in the COCO format: somebody's own data, for evaluation."""

from pathlib import Path

from coca_lit.data.datasets.annotations import read_coco
from coca_lit.data.records import Record, not_found, records_on_disk


def coco_folder_records(root: str | Path, annotations: str = "captions.json", images: str = "images") -> list[Record]:
    """Records of `root`/`annotations`, whose images lie in `root`/`images`.

    Args:
        annotations: COCO captions schema, {"images": [{id, file_name}], "annotations": [{image_id, caption}]}; may be
            .json.gz. An image may have any number of captions, and a "domain", by which it is scored separately.
    """
    path, folder = Path(root) / annotations, Path(root) / images
    how = "pass the folder as records.root, and the names inside it as records.annotations and records.images"
    if not path.is_file():
        raise not_found("the file of captions", [path], how)
    return records_on_disk(read_coco(path), [folder], path, how)

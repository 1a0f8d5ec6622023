"""Annotations that a stranger has written are refused in one sentence."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coca_lit.data.datasets.annotations import read_karpathy, read_references
from coca_lit.data.datasets.captions import coco_folder_records
from coca_lit.data.datasets.classification import read_classes
from coca_lit.errors import DataError
from coca_lit.tools.score.results import read_results
from helpers.fuzzing import bounded, damaged, forged, fuzz

pytestmark = pytest.mark.slow


def test_a_list_of_captions(tmp_path):
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(DataError, match=r"captions\.json.*COCO captions.* list") as caught:
        coco_folder_records(tmp_path)
    assert "indices" not in str(caught.value)


KARPATHY = {
    "images": [
        {"filename": f"{i}.jpg", "split": split, "imgid": i, "cocoid": 10 + i, "sentences": [{"raw": "a dog"}]}
        for i, split in enumerate(["train", "restval", "val"])
    ]
}
COCO = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "domain": "near-domain"} for i in range(2)],
    "annotations": [{"image_id": i, "caption": "a dog", "id": i} for i in range(2)],
}
RESULTS = [{"image_id": i, "caption": "a dog"} for i in range(3)]


@fuzz
@given(st.data())
def test_forged_annotations(forged_files, data):
    (forged_files / "images").mkdir(exist_ok=True)
    for i in range(2):
        (forged_files / "images" / f"{i}.jpg").touch()
    path = forged_files / "captions.json"
    for document, reader in (
        (KARPATHY, lambda: read_karpathy(path, "train")),
        (COCO, lambda: coco_folder_records(forged_files)),
        (data.draw(st.sampled_from([KARPATHY, COCO])), lambda: read_references(path, "val")),
        (RESULTS, lambda: read_results(path)),
        ({"classes": {"a": "dog"}, "templates": ["a photo of a {}."]}, lambda: read_classes(path)),
    ):
        content = data.draw(forged(document))
        path.write_bytes(content)
        with bounded():
            reader()
    packed = forged_files / "captions.json.gz"
    packed.write_bytes(data.draw(damaged(gzip.compress(json.dumps(COCO).encode()))))
    with bounded():
        coco_folder_records(forged_files, annotations=packed.name)

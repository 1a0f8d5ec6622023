"""The probe of pixels against plain NumPy and scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from sklearn.linear_model import LogisticRegression

from coca_lit.data.scenes.render import COLOURS, SHAPES, decode, render, scene_records
from coca_lit.errors import DataError
from coca_lit.evals import Settings
from coca_lit.models import CoCa, create_model
from coca_lit.projects.classification.masks import Segmentation, regions, scene_shapes
from coca_lit.projects.classification.segmentation import SegmentationScores, mean_iou


def test_regions_show_what_is_drawn() -> None:
    """Where a pixel has the colour of a thing, its region is of such a thing; where it has that of the corner, none."""
    for record in scene_records("val", count=40):
        pixels, region = np.asarray(render(int(record.id))), np.asarray(regions(int(record.id)))
        assert not region[(pixels == pixels[0, 0]).all(axis=2)].any()
        things = decode(int(record.id)).things
        for thing in things:
            shown = (pixels == COLOURS[thing.colour]).all(axis=2)
            assert shown.any()
            assert {things[place - 1].colour for place in region[shown]} == {thing.colour}


def pixel_features(model: CoCa, images: Segmentation) -> tuple[np.ndarray, np.ndarray]:
    """The tokens (N, 4, 4, C), and between the centres of these cells at each pixel (N, 32 · 32, C)."""
    pixels = np.stack([np.asarray(record.image()).transpose(2, 0, 1) for record in images.records])
    with torch.no_grad():
        cells = model.image_encoder(torch.from_numpy(pixels)).double().numpy().reshape(len(pixels), 4, 4, -1)
    place = np.clip((np.arange(32) + 0.5) / 8 - 0.5, 0, 3)
    shares = np.maximum(1 - np.abs(place[:, None] - np.arange(4)), 0)  # (32, 4)
    return cells, np.einsum("yh,xw,nhwc->nyxc", shares, shares, cells).reshape(len(pixels), 1024, -1)


@pytest.mark.slow
def test_miou_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("coca_tiny").eval()
    training, images = scene_shapes("train", count=60), scene_shapes("val", count=16)
    evaluation = SegmentationScores("scenes", images, training, pixels=24, c=3.0)
    scores = evaluation.evaluate(model, Settings(tmp_path, images=12))
    images = Segmentation(images.records[:12], images.masks[:12], images.class_names)

    cells, known = pixel_features(model, training)
    mean = cells.mean(axis=(0, 1, 2))
    deviation = np.maximum(cells.std(axis=(0, 1, 2), ddof=1), 1e-6)  # a channel may be 0 everywhere
    generator = torch.Generator().manual_seed(0)
    x, y = [], []
    for features, mask in zip(known, training.masks, strict=True):
        chosen = torch.randint(1024, (24,), generator=generator).numpy()
        x.append((features[chosen] - mean) / deviation)
        y.append(mask().ravel()[chosen])
    theirs = LogisticRegression(C=3.0, tol=1e-6, max_iter=5000).fit(np.concatenate(x), np.concatenate(y))
    found = np.stack([theirs.predict((f - mean) / deviation) for f in pixel_features(model, images)[1]])
    kinds = ["background", *SHAPES]
    truth = np.stack(
        [
            np.take([0, *(kinds.index(thing.shape) for thing in decode(int(r.id)).things)], regions(int(r.id))).ravel()
            for r in images.records
        ]
    )
    ious = [((found == k) & (truth == k)).sum() / ((found == k) | (truth == k)).sum() for k in np.unique(truth)]
    assert len(ious) == len(kinds)
    assert scores == {"scenes/segmentation/miou": pytest.approx(np.mean(ious), abs=2e-3)}
    assert len(np.unique(found)) > 3
    low, high = evaluation.draws["scenes/segmentation/miou"].interval()
    assert low < np.mean(ious) < high


def test_resampled_images_and_a_class_that_does_not_occur() -> None:
    both, either, true = np.array([[[4, 1, 0], [2, 0, 0]], [[5, 2, 0], [4, 3, 1]], [[4, 2, 0], [3, 1, 0]]], float)
    counts = np.array([[1, 1], [0, 2]], float)
    found = mean_iou(both, either, true)(counts)["segmentation/miou"]
    np.testing.assert_allclose(found, [(6 / 9 + 1 / 5) / 2, (4 / 8 + 0 / 6) / 2])


def test_other_classes_and_numbers_out_of_range_are_refused() -> None:
    training = scene_shapes("train", count=2)._replace(class_names=("background",))
    with pytest.raises(DataError, match=r"must have the classes of the others: got 1 and 7"):
        SegmentationScores("scenes", scene_shapes("val", count=2), training)
    shapes = scene_shapes("val", count=2)
    for wrong in ({"pixels": 0}, {"c": 0}):
        with pytest.raises(ValueError, match=rf"^{next(iter(wrong))} must be a "):
            SegmentationScores("scenes", shapes, shapes, **wrong)

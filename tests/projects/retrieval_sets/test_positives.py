"""Retrieval with many right answers: against the package of ECCV Caption, loops, and files in the published layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from coca_lit.data.datasets.captions import mscoco_records
from coca_lit.errors import DataError
from coca_lit.evals import Settings
from coca_lit.metrics.uncertainty import exact
from coca_lit.projects.retrieval_sets.evaluation import PositiveRetrieval, positive_scores
from coca_lit.projects.retrieval_sets.positives import Positives, cxc_positives, eccv_positives
from helpers.evaluating import make_model, noise, records

IMAGES = 12


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Karpathy's file of twelve images with five captions, the last with six; pairs of CxC and ECCV Caption."""
    rng = np.random.default_rng(0)
    (tmp_path / "val2014").mkdir()
    images, ids = [], {}
    for i in range(IMAGES):
        name = f"COCO_val2014_{100 + i:012d}.jpg"
        noise(i).save(tmp_path / "val2014" / name)
        ids[100 + i] = [1000 + 10 * i + n for n in range(5 + (i == IMAGES - 1))]
        sentences = [{"raw": " ".join(rng.choice(["one", "two", "three"], 4)), "sentid": id} for id in ids[100 + i]]
        images.append({"cocoid": 100 + i, "imgid": i, "filename": name, "split": "test", "sentences": sentences})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    captions = [id for own in ids.values() for id in own[:5]]
    of_image = {str(image): sorted({*own[:2], *rng.choice(captions, 3).tolist()}) for image, own in ids.items()}
    of_caption: dict[str, list[int]] = {}
    for image, own in of_image.items():
        for id in own:
            of_caption.setdefault(str(id), []).append(int(image))
    (tmp_path / "eccv_image_to_caption.json").write_text(json.dumps(of_image))
    (tmp_path / "eccv_caption_to_image.json").write_text(json.dumps(of_caption))
    rows = [
        f"COCO_val2014:sentid:{id},COCO_val2014_{image:012d}.jpg,{grade},c2i_intrasim"
        for image, own in ids.items()
        for id, grade in ((own[0], 3.0), (own[1], 2.99), (1000, 4.5))
    ]
    (tmp_path / "sits_test.csv").write_text("\n".join(["caption,image,agg_score,sampling_method", *rows]))
    return tmp_path


def test_equal_to_eccv_caption(root: Path) -> None:
    """Recall, R-precision and mAP@R of CxC, ECCV Caption and the folds, without ties."""
    theirs = pytest.importorskip("eccv_caption").Metrics()
    listed = mscoco_records(root, "test")
    positives = eccv_positives(root, root)
    evaluation = PositiveRetrieval("eccv_caption", listed, positives)
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(IMAGES, 16, generator=generator), torch.randn(5 * IMAGES, 16, generator=generator)
    found = exact(IMAGES, evaluation.resampled(evaluation.records, images, texts))
    captions = [id for own in positives.captions.values() for id in own[:5]]
    names = [record.id for record in listed]
    similarity = images @ texts.T
    i2t = {
        image: [captions[t] for t in row.argsort(descending=True)] for image, row in zip(names, similarity, strict=True)
    }
    t2i = {
        id: [names[i] for i in column.argsort(descending=True)]
        for id, column in zip(captions, similarity.T, strict=True)
    }
    theirs.set_eccv_gts(root / "eccv_image_to_caption.json", root / "eccv_caption_to_image.json")
    of_others = theirs.eccv_metrics({"i2t": i2t, "t2i": t2i}, "all")
    recalls = {k: theirs.eccv_recalls({"i2t": i2t, "t2i": t2i}, "all", K=k) for k in (1, 5, 10)}
    for way in ("i2t", "t2i"):
        assert found[f"{way}_map@r"] == pytest.approx(of_others["eccv_map_at_r"][way], abs=1e-12)
        assert found[f"{way}_r_precision"] == pytest.approx(of_others["eccv_rprecision"][way], abs=1e-12)
        for k in (1, 5, 10):
            assert found[f"{way}_recall@{k}"] == pytest.approx(recalls[k][way], abs=1e-12)


def test_a_tie_counts_against_the_model() -> None:
    """Candidates 0 and 2 are right. All tie for the first query; a wrong one with the better one for the second."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidates = torch.tensor([[0.5, 0.9], [0.5, 0.9], [0.5, 0.1], [0.5, 0.2]])
    found = positive_scores(queries, candidates, [[0, 2], [0, 2]], ks=(1, 2, 3))
    assert {name: values.tolist() for name, values in found.items()} == {
        "recall@1": [0, 0],
        "recall@2": [0, 1],
        "recall@3": [1, 1],
        "r_precision": [0, 0.5],
        "map@r": [0, 0.25],
    }
    with pytest.raises(ValueError, match="right answers"):
        positive_scores(queries, candidates, [[0], []])
    with pytest.raises(ValueError, match="NaN"):
        positive_scores(queries * torch.nan, candidates, [[0], [0]])


def test_grades_from_3_on_are_positive(root: Path) -> None:
    positives = cxc_positives(root, root)
    assert positives.of_image[105] == [1050, 1000]
    assert positives.of_caption[1000] == [100, *(100 + i for i in range(IMAGES))]
    assert 1051 not in positives.of_caption
    assert len(positives.captions[111]) == 6


def test_scores_of_a_model(root: Path, tmp_path: Path) -> None:
    evaluation = PositiveRetrieval("cxc", mscoco_records(root, "test"), cxc_positives(root, root))
    model = make_model()
    scores = evaluation.evaluate(model, Settings(tmp_path))
    assert {f"cxc/{name}" for name in evaluation.score_names} == scores.keys() == evaluation.draws.keys()
    assert evaluation.evaluate(model, Settings(tmp_path, full=False)) == pytest.approx(scores)
    for draws in evaluation.draws.values():
        low, high = draws.interval()
        assert 0 <= low <= draws.score <= high <= 1
    assert max(len(record.captions) for record in evaluation.records) == 5
    few = evaluation.evaluate(model, Settings(tmp_path, images=3, full=False))
    assert few.keys() == scores.keys()
    with pytest.raises(DataError, match="no ids"):
        PositiveRetrieval("x", records(), cxc_positives(root, root))
    lone = Positives({record.id: range(9) for record in records()}, {}, {})
    with pytest.raises(DataError, match="no right answer"):
        PositiveRetrieval("x", records(), lone).evaluate(model, Settings(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("sits_test.csv", "caption,image\n", "holds no"),
        ("sits_test.csv", "caption,image,agg_score\nx:y:z,a_1.jpg,3\n", "CxC's schema"),
        ("sits_test.csv", "caption,image,agg_score\n", "holds no"),
        ("eccv_image_to_caption.json", "[]", "not an object"),
        ("eccv_image_to_caption.json", '{"a": [1]}', "ECCV Caption's schema"),
        ("eccv_caption_to_image.json", '{"1": [1.5]}', "whole numbers"),
        ("eccv_caption_to_image.json", '{"1": 7}', "ECCV Caption's schema"),
        ("dataset_coco.json", '{"images": [{"split": "test", "sentences": [{}]}]}', "'sentid' is missing"),
    ],
)
def test_files_of_strangers(root: Path, name: str, content: str, said: str) -> None:
    (root / name).write_text(content)
    with pytest.raises(DataError, match=said):
        (cxc_positives if name.startswith("sits") else eccv_positives)(root, root)

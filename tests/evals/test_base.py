"""What every evaluation records about its scores."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coca_lit.data.records import Record
from coca_lit.errors import DataError
from coca_lit.evals import FunctionEvaluation, Settings
from coca_lit.evals.captions import CaptionScores
from coca_lit.evals.retrieval import RetrievalScores
from coca_lit.metrics.uncertainty import digest
from coca_lit.models import create_model

RECORDS = [Record(i, f"none{i}.jpg", [f"a{i}", f"b{i}"], domain="near" if i < 3 else "far") for i in range(10)]


def test_scores_are_recorded_with_what_they_depend_on(tmp_path: Path) -> None:
    evaluation = FunctionEvaluation("x", RECORDS, lambda *_: {"mine": 1.0, "near/mine": 1.0})
    settings = Settings(tmp_path, split="test", images=8, generate={"num_beams": 3, "strategy": "beam"})
    model = create_model("coca_tiny")
    evaluation.evaluate(model, settings)
    whole, near = (evaluation.conditions[f"x/{name}"] for name in ("mine", "near/mine"))
    assert (whole.split, whole.images, whole.texts) == ("test", 8, 16)
    assert whole.image_digest == digest(range(8))
    assert whole.text_digest == digest(text for i in range(8) for text in (f"a{i}", f"b{i}"))
    assert (near.images, near.image_digest) == (3, digest(range(3)))
    assert whole.settings == {"generate.num_beams": 3, "generate.strategy": "beam"}
    evaluation.evaluate(model, Settings(tmp_path, generate={"temperature": None}))
    assert evaluation.conditions["x/mine"].settings == {}  # a default that is written down is the default
    evaluation.evaluate(model, Settings(tmp_path, full=False), limit=4)
    assert evaluation.conditions == {}


@dataclass
class WithoutHash:
    """As an ordinary dataclass is."""

    size: int

    def __call__(self) -> Image.Image:
        return Image.new("RGB", (self.size, self.size))


def test_several_questions_about_an_image_are_of_one_image_with_a_hash_or_without(tmp_path: Path) -> None:
    for images in ((WithoutHash(8), WithoutHash(8)), ("a.jpg", "b.jpg")):
        records = [Record(i, images[i // 3], "a") for i in range(6)]
        evaluation = FunctionEvaluation("x", records, lambda *_: {"mine": 1.0})
        evaluation.evaluate(create_model("coca_tiny"), Settings(tmp_path))
        assert evaluation.conditions["x/mine"].images == 2


@pytest.mark.parametrize("value", [torch.tensor(1.0), np.float32(1), True, 1])
def test_scores_are_numbers_that_json_takes(tmp_path: Path, value: Any) -> None:
    evaluation = FunctionEvaluation("x", RECORDS, lambda *_: {"mine": value})
    assert json.dumps(evaluation.evaluate(create_model("coca_tiny"), Settings(tmp_path))) == '{"x/mine": 1.0}'


def test_two_records_of_one_id_are_refused_before_anything_is_scored() -> None:
    with pytest.raises(DataError, match="two records of 'x' have the id 4: give each its own"):
        FunctionEvaluation("x", [*RECORDS, RECORDS[4]], lambda *_: {})


@pytest.mark.parametrize(
    ("score", "depends"),
    [
        ("CIDEr", {"generate.strategy": "beam"}),
        ("CLIPScore", {"generate.strategy": "beam", "judge": "clip.bin"}),
        ("t2i_recall@1", {}),
        ("reranked_t2i_recall@1", {"rerank": 4, "rerank_weight": 0.25}),
    ],
)
def test_settings_that_a_score_depends_on(tmp_path: Path, score: str, depends: dict[str, object]) -> None:
    settings = Settings(tmp_path, generate={"strategy": "beam"}, clip_score_model="clip.bin", rerank=4)
    retrieval = RetrievalScores("x", RECORDS, rerank_weight=0.25)
    evaluation = retrieval if "recall" in score else CaptionScores("x", RECORDS)
    assert evaluation.depends_on(score, settings) == depends

"""What a run writes about its scores: `draws.npz` and `conditions.json`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coca_lit.errors import DataError
from coca_lit.metrics.uncertainty import Conditions, Ratios, bootstrap
from coca_lit.runs.results import CONDITIONS, read_conditions, read_draws, write_conditions, write_draws

ROW = {"split": "test", "images": 64, "image_digest": "a", "texts": 320, "text_digest": "b", "settings": {"rerank": 4}}


def test_draws_of_a_measure_in_percent_come_back(tmp_path: Path) -> None:
    """Its name ends as that of a share, but it is none: its interval is that of a mean."""
    values = np.random.default_rng(0).normal(72, 10, size=400)
    draws = bootstrap(range(400), Ratios({"colour_accuracy": (values, None), "accuracy": (values > 72, None)}))
    low, high = draws["colour_accuracy"].interval()
    half = 1.96 * values.std() / 400**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15)
    write_draws(tmp_path, {f"x/{name}": of for name, of in draws.items()})
    found = read_draws(tmp_path)
    assert {name: of.share for name, of in found.items()} == {"x/colour_accuracy": False, "x/accuracy": True}
    assert {of.trials for of in found.values()} == {400}
    assert found["x/colour_accuracy"].interval() == (low, high)


def test_conditions_come_back(tmp_path: Path) -> None:
    assert read_conditions(tmp_path) == {}
    first, second = Conditions(**ROW), Conditions(**ROW | {"settings": {}})
    known = {"x/CIDEr": first, "x/METEOR": first, "x/t2i_recall@1": second}
    write_conditions(tmp_path, known)
    assert read_conditions(tmp_path) == known
    assert len(json.loads((tmp_path / CONDITIONS).read_text())) == 2  # equal ones are written once


@pytest.mark.parametrize(
    "content",
    [
        {"x": 1},
        [1],
        [{**ROW}],
        [{"scores": "x/CIDEr", **ROW}],
        [{"scores": [1], **ROW}],
        [{"scores": ["x"], **ROW, "images": "64"}],
        [{"scores": ["x"], **ROW, "settings": [1]}],
        [{"scores": ["x"], **ROW, "more": 1}],
    ],
)
def test_what_no_run_writes_is_one_sentence(tmp_path: Path, content: Any) -> None:
    (tmp_path / CONDITIONS).write_text(json.dumps(content))
    with pytest.raises(DataError, match=CONDITIONS):
        read_conditions(tmp_path)

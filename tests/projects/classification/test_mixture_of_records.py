"""Records of several sources: shares by the weights, validation on the first source."""

from collections import Counter

import pytest

from coca_lit.data.records import Record
from coca_lit.errors import DataError
from coca_lit.projects.classification.mixture import weighted_records


def source(name: str, count: int):
    return lambda split: [Record(i, lambda: None, f"{name} {split} {i}") for i in range(count)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_shares_are_those_of_the_weights(share: float) -> None:
    sources = {"pairs": source("a", 90), "classes": source("b", 30)}
    records = weighted_records("train", sources, {"pairs": 1 - share, "classes": share})
    assert len({record.id for record in records}) == len(records)
    counts = Counter(record.captions[0].split()[0] for record in records)
    assert counts["b"] / len(records) == pytest.approx(share, abs=0.01)
    for letter, count in (("a", 90), ("b", 30)):
        times = Counter(record.captions[0] for record in records if record.captions[0].startswith(letter))
        assert len(times) == min(count, counts[letter])
        assert max(times.values()) - min(times.values()) <= 1
    assert min(counts["a"] / 90, counts["b"] / 30) == 1 or counts["a"] == 90 or counts["b"] == 30


def test_validation_is_the_first_source_alone() -> None:
    sources = {"pairs": source("a", 9), "classes": source("b", 3)}
    records = weighted_records("val", sources, {"pairs": 1, "classes": 9})
    assert [record.captions[0] for record in records] == [f"a val {i}" for i in range(9)]


@pytest.mark.parametrize(
    ("sources", "weights", "said"),
    [
        ({"a": source("a", 1)}, {"b": 1}, "weights are of b, and sources a"),
        ({"a": source("a", 1)}, {"a": 0}, "above 0"),
        ({"a": source("a", 0)}, {"a": 1}, "source a has no training records"),
    ],
)
def test_wrong_sources(sources, weights, said: str) -> None:
    with pytest.raises(DataError, match=said):
        weighted_records("train", sources, weights)

"""Keys and values of nested configs."""

from typing import Any

import pytest
import yaml

from coca_lit.cli.schema import leaves, part_of, written


def test_keys_of_all_values() -> None:
    config = {"data": {"root": "x", "further": {}}, "splits": ["a", {"b": 1}], "none": None}
    assert dict(leaves(config)) == {"data.root": "x", "data.further": {}, "splits": ["a", {"b": 1}], "none": None}
    assert dict(leaves(3, "ema")) == {"ema": 3}


@pytest.mark.parametrize("value", [1e-05, 0.1, None, True, "true", "a: b", [1, "x"], {"a": [1e-5]}])
def test_values_are_written_so_that_yaml_reads_them(value: Any) -> None:
    text = written(value)
    assert "\n" not in text
    assert yaml.safe_load(text) in (value, str(value))  # YAML takes 1e-05 for a text, and OmegaConf for a number


def test_a_part_of_another_kind_is_empty() -> None:
    assert part_of({"data": {"root": 1}}, "data") == {"root": 1}
    assert part_of({"data": [1]}, "data") == part_of({}, "data") == {}

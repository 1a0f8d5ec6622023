from collections.abc import Iterable
from typing import Any

import pytest


def slow(*cases: Any) -> Iterable[Any]:
    """Cases of a parametrised test that a plain `pytest` leaves out; a tuple holds a value for each argument."""
    return (pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in cases)

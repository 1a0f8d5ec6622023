"""`scoring="openclip"` against the beam search of Transformers, which OpenCLIP 4 calls, with the same model."""

import pytest

pytest.importorskip("transformers")
from helpers.transformers_beams import check_captions_and_scores


def test_captions_and_scores_are_those_of_transformers() -> None:
    check_captions_and_scores(0, 0.5, 6, 12, 5, 1.0, {})
    check_captions_and_scores(3, 2.0, 4, 8, 0, 0.5, {})

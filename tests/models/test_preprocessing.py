"""The largest image that a model takes."""

import pytest

from coca_lit.models.inputs import largest_shape, preprocessing


@pytest.mark.parametrize("patches", [1, 2, 7, 12, 36, 48, 100, 240, 256])
def test_the_largest_shape_is_the_nearest_to_a_square_of_all_that_fill_the_patches(patches: int) -> None:
    plain = preprocessing(30, "bicubic", "shortest")
    shape = largest_shape({**plain, "patch_size": 16, "max_patches": patches})
    whole = [(16 * a, 16 * b) for a in range(1, patches + 1) for b in range(a, patches + 1) if a * b == patches]
    assert shape == min(whole, key=lambda sides: sides[1] - sides[0])
    assert largest_shape(plain) == (30, 30)

"""Look-alikes and the split that keeps them together."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coca_lit.data.near_duplicates import MAX_DISTANCE, hash_files, held_out, look_alikes, perceptual_hash
from coca_lit.data.scenes.render import render
from coca_lit.errors import DataError


def test_groups_of_long_chains_are_those_of_scipy() -> None:
    components = pytest.importorskip("scipy.sparse.csgraph").connected_components
    rng = random.Random(3)
    for steps in (5, 50, 150):
        hashes = {found := rng.getrandbits(63)} | {rng.getrandbits(63) for _ in range(20)}
        for _ in range(steps):  # two walks from one hash, whose ways may cross, each step as far as near-duplicates are
            for start in (found, rng.choice([*hashes])):
                found = start ^ sum(1 << bit for bit in rng.sample(range(63), rng.randint(2, MAX_DISTANCE)))
                hashes.add(found)
        shuffled = rng.sample([*hashes], len(hashes))
        near = [[(one ^ other).bit_count() <= MAX_DISTANCE for other in shuffled] for one in shuffled]
        count, labels = components(np.array(near), directed=False)
        expected = {frozenset(np.flatnonzero(labels == label).tolist()) for label in range(count)}
        assert {frozenset(group) for group in look_alikes(shuffled)} == expected


def test_differences_are_found_wherever_they_are() -> None:
    """Hashes whose bits differ in any places, also all within one band or one in each."""
    rng = random.Random(2)
    for count in range(1, MAX_DISTANCE + 2):
        for _ in range(50):
            one = rng.getrandbits(64)
            other = one
            for bit in rng.sample(range(64), count):
                other ^= 1 << bit
            signed = [value - 2**64 if value >= 2**63 else value for value in (one, other)]
            assert len(look_alikes(signed)) == (1 if count <= MAX_DISTANCE else 2)


def test_copies_are_caught_and_mirror_images_are_not(tmp_path: Path) -> None:
    photo = render(3, size=200)
    photo.save(tmp_path / "a.png")
    photo.save(tmp_path / "b.jpg", quality=60)
    photo.resize((90, 90)).save(tmp_path / "c.jpg")
    photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "d.jpg")
    (tmp_path / "e.jpg").write_bytes(b"no image")
    hashes = hash_files([tmp_path / name for name in ("a.png", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "gone.jpg")])
    assert hashes[0] == perceptual_hash(photo)
    assert hashes[4:] == [None, None]
    assert look_alikes(hashes) == [[0, 1, 2], [3], [4], [5]]


def test_a_tenth_is_held_out_in_whole_groups_whatever_the_order() -> None:
    rng = random.Random(1)
    hashes: list[int | None] = [rng.getrandbits(64) - 2**63 for _ in range(200)]
    hashes += hashes[:50]  # copies
    chosen = held_out(hashes, 0.1)
    assert 25 <= len(chosen) <= 26
    assert all((i in chosen) == (i + 200 in chosen) for i in range(50))
    order = rng.sample(range(len(hashes)), len(hashes))
    shuffled = held_out([hashes[i] for i in order], 0.1)
    assert {order[i] for i in shuffled} == chosen


def test_a_burst_is_not_held_out_and_few_photos_lose_one() -> None:
    rng = random.Random(2)
    burst: list[int | None] = [7] * 20 + [rng.getrandbits(63) for _ in range(20)]
    chosen = held_out(burst, 0.1)
    assert len(chosen) == 4
    assert min(chosen) >= 20
    assert len(held_out([1, 2**32 - 1, -1], 0.1)) == 1
    with pytest.raises(DataError, match="all 3 photos look alike"):
        held_out([5, 5, 4], 0.1)


def test_photos_that_are_all_broken_are_told_with_the_reason(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("text")
    with pytest.raises(DataError, match=r"^none of 2 photos can be decoded, e\.g\. .*a\.jpg is not a readable image: "):
        hash_files([tmp_path / "a.jpg", tmp_path / "b.jpg"])


def test_a_broken_photo_is_not_held_out() -> None:
    assert held_out([*[None] * 8, 1, 2**32 - 1], 0.5) == {8, 9}
    with pytest.raises(DataError, match=r"all 3 photos look alike or cannot be decoded \(2\)"):
        held_out([None, None, 5], 0.1)

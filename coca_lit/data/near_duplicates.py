"""Photos that look the same: their hashes, and a split that keeps them on one side.

What is caught: copies that are scaled, recompressed, slightly brighter or a little cropped at an edge, and most
neighbours in a burst. What is not: mirrored, rotated or clearly cropped copies, and other photos of the same subject.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coca_lit.data.inputs import source_of
from coca_lit.distributed import stable_seed
from coca_lit.errors import DataError
from coca_lit.files import state_of
from coca_lit.machine import processors
from coca_lit.progress import ProgressBar

_known: dict[tuple[Path, tuple[int, ...]], int | None] = {}  # hashes of files in a state
MAX_DISTANCE = 4  # bits of 64 in which near-duplicates differ; unrelated photos differ in about 32
_SIDE = 32  # pixels
# The first 8 rows of the discrete cosine transform of type II, (8, 32).
_COSINES = 2 * np.cos(math.pi / (2 * _SIDE) * np.outer(np.arange(8), 2 * np.arange(_SIDE) + 1))


def perceptual_hash(image: Image.Image) -> int:
    """64 bits, as a signed integer, that survive scaling and recompression: which of the 8 x 8 lowest frequencies of
    the grey picture lie above their median. The same bits as `phash` of the package ImageHash.
    """
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = _COSINES @ grey @ _COSINES.T  # (8, 8)
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big", signed=True)


def hash_files(paths: Sequence[Path]) -> list[int | None]:
    """The hash of each file, of its picture; None for one that cannot be decoded.
    Files are decoded once per process, as long as they do not change.

    Raises:
        DataError: none of them can be decoded.
    """
    files = [(path, state_of(path)) for path in paths]
    new = [file for file in dict.fromkeys(files) if file not in _known]
    with ProgressBar("reading photos") as progress, ThreadPoolExecutor(min(8, processors())) as pool:
        for done, (file, found) in enumerate(zip(new, pool.map(_hash_of, new), strict=True), start=1):
            _known[file] = found
            progress.reach(done, len(new))
    hashes = [_known[file] for file in files]
    if {*hashes} == {None}:
        try:
            source_of(paths[0])()
        except DataError as error:
            raise DataError(f"none of {len(paths)} photos can be decoded, e.g. {error}") from error
    return hashes


def _hash_of(file: tuple[Path, tuple[int, ...]]) -> int | None:
    try:
        return perceptual_hash(source_of(file[0])())
    except DataError:
        return None


def look_alikes(hashes: Sequence[int | None]) -> list[list[int]]:
    """Groups of indices of near-duplicates: chains of hashes, each at most `MAX_DISTANCE` bits from the next. An
    unknown hash is alone.
    """
    different = np.array([*{found for found in hashes if found is not None}], dtype=np.int64)
    parents = [*range(len(different))]  # a union-find: a hash leads to another of its chain, the last one to itself

    def end(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]  # next time the way is half as long
            i = parents[i]
        return i

    for i, j in _near_pairs(different):
        parents[end(i)] = end(j)
    chain = {found: end(i) for i, found in enumerate(different.tolist())}
    groups: dict[int, list[int]] = {}
    for i, found in enumerate(hashes):
        groups.setdefault(-1 - i if found is None else chain[found], []).append(i)
    return list(groups.values())


def _near_pairs(hashes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Pairs of hashes with at most `MAX_DISTANCE` different bits, some of them several times. Of `MAX_DISTANCE + 1`
    bands of bits, one is the same in such a pair, by the pigeonhole principle: only hashes that share one are compared.

    Args:
        hashes: (N,), all different.
    """
    bits = hashes.view(np.uint64)
    limits = [64 * band // (MAX_DISTANCE + 1) for band in range(MAX_DISTANCE + 2)]
    for low, high in pairwise(limits):
        band = (bits >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.argsort(band)
        band = band[order]
        for shift in range(1, len(bits)):  # each hash and the `shift`-th after it
            places = np.flatnonzero(band[shift:] == band[:-shift])
            if not places.size:
                break
            i = order[places]
            j = order[places + shift]
            near = np.unpackbits((bits[i] ^ bits[j]).view(np.uint8)).reshape(-1, 64).sum(1) <= MAX_DISTANCE
            yield from zip(i[near].tolist(), j[near].tolist(), strict=True)


def held_out(hashes: Sequence[int | None], share: float) -> set[int]:
    """Indices of about `share` of the photos, at least one: whole groups of look-alikes, in the order of a number
    that depends on the content alone, so that it hardly matters which photos are added later. A photo without a hash
    stays in the training, which replaces it.

    Raises:
        DataError: all photos that can be decoded look alike, so that no part of them tests anything.
    """
    groups = [group for group in look_alikes(hashes) if hashes[group[0]] is not None]
    if len(groups) < 2:
        broken = f" or cannot be decoded ({hashes.count(None)})" if None in hashes else ""
        raise DataError(
            f"all {len(hashes)} photos look alike{broken}, so none can be held out for scores: to train on all, "
            "list them in a captions.csv with a column split of train, and set data.val_split=null 'evals=[]'"
        )
    wanted = max(1, round(share * len(hashes)))

    def order(group: list[int]) -> int:
        return min(stable_seed("held out", found) for i in group if (found := hashes[i]) is not None)

    chosen: set[int] = set()
    for group in sorted(groups, key=order):
        if len(chosen) < wanted and len(chosen) + len(group) <= 2 * wanted:  # a long burst stays in the training
            chosen.update(group)
    smallest: list[int] = min(groups, key=len)
    return chosen or set(smallest)

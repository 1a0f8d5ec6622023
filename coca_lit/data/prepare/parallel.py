"""Work on many files in several processes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Shared = TypeVar("Shared")


def parallel_map(
    function: Callable[[Item, Shared], Result], items: Sequence[Item], shared: Shared, workers: int
) -> Iterator[Result]:
    """`function(item, shared)` of each item, as it is done; in this process where a second one would be idle."""
    if min(workers, len(items)) < 2:
        yield from (function(item, shared) for item in items)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(function, item, shared) for item in items]):
            yield done.result()

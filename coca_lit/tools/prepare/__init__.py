"""Writing and checking shards."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

# A function, items, and what all calls share -> `function(item, shared)` of each item, as it is done.
Run = Callable[[Callable[[Any, Any], Any], Sequence[Any], Any], Iterator[Any]]

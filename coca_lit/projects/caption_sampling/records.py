"""Records whose captions are made of others: several in one text, or each sentence by itself.

Both stand in front of the function that reads the records, which gets all other arguments:
`data.records._target_=….merged` and `data.records.records={_target_: the function, _partial_: true}`. Only the split
"train" changes.
"""

import re
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

from coca_lit.data.records import Record
from coca_lit.errors import check_number

Reader = Callable[..., Sequence[Record]]  # its last argument is the split


def merged(*place: Any, records: Reader, count: int = 2, **options: Any) -> list[Record]:
    """The captions of a training record become texts of `count` of its captions, in every choice and order. A record
    with fewer captions has all of them in one text.
    """
    check_number("count", count, whole=True, at_least=1)
    found = list(records(*place, **options))
    if place[-1] != "train":
        return found
    return [record._replace(captions=_merged(record.captions, count)) for record in found]


def _merged(captions: Sequence[str], count: int) -> tuple[str, ...]:
    sentences = [caption if caption.endswith((".", "!", "?")) else f"{caption}." for caption in captions]
    return tuple(" ".join(chosen) for chosen in permutations(sentences, min(count, len(sentences))))


def sentences(*place: Any, records: Reader, **options: Any) -> list[Record]:
    """Each sentence of the captions of a training record becomes a caption of its own."""
    found = list(records(*place, **options))
    if place[-1] != "train":
        return found
    return [record._replace(captions=_sentences(record.captions)) for record in found]


def _sentences(captions: Sequence[str]) -> tuple[str, ...]:
    return tuple(sentence for caption in captions for sentence in re.split(r"(?<=[.!?])\s+", caption))

"""Training captions twice: as they are, and with one phrase replaced by a paraphrase of METEOR's table (Denkowski and
Lavie 2014), which was extracted from parallel texts and comes with pycocoevalcap.
"""

import gzip
import random
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from coca_lit.data.datasets.captions import FlickrName, flickr_records
from coca_lit.data.records import Record
from coca_lit.distributed import stable_seed
from coca_lit.tokenizer import frequent_words, split_words

LONGEST = 3  # words of a phrase
Phrase = tuple[str, ...]


def paraphrased_records(
    root: str | Path, split: str, name: FlickrName = "flickr8k", likelihood: float = 0.25, min_count: int = 4
) -> list[Record]:
    """`flickr_records`, where the training captions are followed by a paraphrase of each that has one.

    Args:
        likelihood: of a paraphrase given its phrase, at least.
        min_count: how often each word of a paraphrase occurs in the training captions, at least.
    """
    records = flickr_records(root, split, name)
    if split != "train":
        return records
    captions = [caption for record in records for caption in record.captions]
    table = paraphrases({p for caption in captions for p in _phrases(split_words(caption))}, likelihood)
    known = set(frequent_words(captions, min_count))
    table = {p: kept for p, others in table.items() if (kept := [other for other in others if known.issuperset(other)])}
    return [
        record._replace(captions=(*record.captions, *(_other(c, table, record.id) for c in record.captions)))
        for record in records
    ]


def paraphrases(phrases: set[Phrase], likelihood: float) -> dict[Phrase, list[Phrase]]:
    """METEOR's paraphrases of each phrase that use other words, not other forms of the same words."""
    (package,) = find_spec("pycocoevalcap").submodule_search_locations  # type: ignore[union-attr,misc]
    found = defaultdict(list)
    with gzip.open(Path(package) / "meteor/data/paraphrase-en.gz", "rt") as file:
        for probability, phrase, other in zip(file, file, file, strict=True):
            if float(probability) >= likelihood:
                one, two = tuple(phrase.split()), tuple(other.split())
                if one in phrases and _stems(one) != _stems(two) and len(two) <= LONGEST:
                    found[one].append(two)
    return found


def _other(caption: str, table: dict[Phrase, list[Phrase]], key: int | str) -> str:
    """The caption with a drawn phrase replaced; the caption itself if none can be."""
    words = split_words(caption)
    places = [(i, j) for i in range(len(words)) for j in range(i + 1, i + LONGEST + 1) if tuple(words[i:j]) in table]
    if not places:
        return caption
    rng = random.Random(stable_seed("paraphrase", key, caption))
    i, j = rng.choice(places)
    return " ".join([*words[:i], *rng.choice(table[tuple(words[i:j])]), *words[j:]])


def _phrases(words: Sequence[str]) -> list[Phrase]:
    return [tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1)]


def _stems(phrase: Phrase) -> set[str]:
    return {word[:3] for word in phrase if len(word) > 2}

"""`coca-data word-list FILE`"""

import csv
from collections import Counter
from collections.abc import Sequence


def word_list(words: Sequence[str]) -> None:
    """Prints each word of the column `caption` with its number, the most frequent first."""
    _, path = words
    with open(path, encoding="utf-8", newline="") as file:
        counts = Counter(word for row in csv.DictReader(file) for word in row["caption"].split())
    for word, count in counts.most_common():
        print(word, count)

"""CapRL's reward (Xing et al. 2025, arXiv 2509.22647) on built-in scenes: how many questions about the image someone
can answer who reads the caption alone. The facts of a scene are known, and a parser of captions is the reader.
"""

from collections.abc import Hashable, Mapping, Sequence

from coca_lit.data.scenes.facts import count_facts, statement
from coca_lit.errors import check_number
from coca_lit.projects.rewards.self_critical import END


class FactReward:
    """The share of the facts of a scene that a caption has right, minus a penalty for each false one. Facts are the
    objects, their sizes and colours, and which two are neighbours. A caption without an end earns 0: its last words may
    be missing.

    Args:
        references: captions of each scene as words, by sample key; any of them states all facts.
        penalty: for a false fact, in facts of the scene.
    """

    def __init__(self, references: Mapping[Hashable, Sequence[Sequence[str]]], penalty: float = 1.0) -> None:
        check_number("penalty", penalty, at_least=0)
        self.penalty = penalty
        self.scenes = {key: statement(" ".join(captions[0][:-1])) for key, captions in references.items()}

    def __call__(self, key: Hashable, captions: Sequence[Sequence[str]]) -> list[float]:
        return [self.of_caption(key, caption) for caption in captions]

    def of_caption(self, key: Hashable, words: Sequence[str]) -> float:
        if not words or words[-1] != END:
            return 0.0
        counts = count_facts(statement(" ".join(words[:-1])), self.scenes[key]).values()
        right = sum(count.right for count in counts)
        false = sum(count.stated - count.right for count in counts)
        return (right - self.penalty * false) / sum(count.true for count in counts)

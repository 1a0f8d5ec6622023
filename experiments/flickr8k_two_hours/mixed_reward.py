"""A reward for self-critical training that counts more than CIDEr-D:

'model.objectives.self_critical.reward={_partial_: true,
  _target_: experiments.flickr8k_two_hours.mixed_reward.MixedReward}'
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from pycocoevalcap.bleu.bleu_scorer import BleuScorer

from coca_lit.projects.rewards.cider import CiderD

RECALL = 0.85  # the share of recall in METEOR 1.5 (Denkowski and Lavie 2014)


class MixedReward:
    """CIDEr-D, plus BLEU-4 of the single caption, plus the F score of its words as METEOR weights it, without METEOR's
    stems, synonyms and penalty of order. CIDEr-D favours short captions, the F score long ones.

    Args:
        references: image -> words of each of its references.
        bleu, recall: weights of BLEU-4 and of the F score, both in [0, 1]; CIDEr-D in [0, 10] has weight 1.
    """

    def __init__(
        self, references: Mapping[Hashable, Sequence[Sequence[str]]], bleu: float = 1.0, recall: float = 2.0
    ) -> None:
        self.cider, self.references, self.bleu, self.recall = CiderD(references), references, bleu, recall

    def __call__(self, image: Hashable, captions: Sequence[Sequence[str]]) -> list[float]:
        references = self.references[image]
        scorer, texts = BleuScorer(n=4), [" ".join(words) for words in references]
        for caption in captions:
            scorer += (" ".join(caption), texts)
        bleu = scorer.compute_score(option="closest", verbose=0)[1][3]
        return [
            cider + self.bleu * b + self.recall * max(word_f(caption, words) for words in references)
            for cider, b, caption in zip(self.cider(image, captions), bleu, captions, strict=True)
        ]


def word_f(caption: Sequence[str], reference: Sequence[str]) -> float:
    """Weighted harmonic mean of precision and recall of the words of one caption."""
    shared = (Counter(caption) & Counter(reference)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(caption), shared / len(reference)
    return precision * recall / (RECALL * precision + (1 - RECALL) * recall)

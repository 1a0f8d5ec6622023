"""Scores of single captions: each candidate alone against the references of its image.

CIDEr counts each candidate as a document, as pycocoevalcap does where several candidates of an image are scored
together, so its words' weights depend on all candidates.
"""

from collections.abc import Sequence

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from coca_lit.metrics.captions import Tokenize
from coca_lit.metrics.cider import CiderD
from coca_lit.metrics.java.meteor import shared_meteor, warm_up
from coca_lit.metrics.java.runtime import JavaError, ptb_tokenize
from coca_lit.metrics.java.spice import Progress, shared_spice
from coca_lit.tools.score.judgments import Judged

Scores = dict[str, np.ndarray]  # score -> a value for each candidate


def reference_scores(
    judged: Judged, tokenize: Tokenize = ptb_tokenize, progress: Progress | None = None
) -> tuple[Scores, dict[str, str]]:
    """BLEU-1 and -4, ROUGE-L, METEOR, CIDEr, CIDEr without its defences, and SPICE (C,) of all candidates, and why some
    could not be computed. "CIDEr" is that of the official code, which the paper calls CIDEr-D.

    Args:
        progress: called with the candidates that SPICE has scored so far and their total.

    Raises:
        JavaError: the tokenizer fails.
        FileNotFoundError: there is no Java.
    """
    warm_up()
    texts = list(
        dict.fromkeys([c.caption for c in judged.candidates] + [t for r in judged.references.values() for t in r])
    )
    tokens = dict(zip(texts, tokenize(texts), strict=True))
    references = [[tokens[text] for text in judged.references[candidate.image]] for candidate in judged.candidates]
    captions = [tokens[candidate.caption] for candidate in judged.candidates]
    numbered = dict(enumerate(references))
    hypotheses = {number: [text] for number, text in enumerate(captions)}

    bleu = BleuScorer(n=4)
    for own, caption in zip(references, captions, strict=True):
        bleu += caption, own
    _, of_order = bleu.compute_score(option="closest", verbose=0)
    scores: Scores = {"Bleu_1": np.array(of_order[0]), "Bleu_4": np.array(of_order[3])}
    scores["ROUGE_L"] = np.array(Rouge().compute_score(numbered, hypotheses)[1])
    not_run: dict[str, str] = {}
    try:
        scores["METEOR"] = shared_meteor().score(references, captions).captions
    except (JavaError, FileNotFoundError) as error:
        not_run["METEOR"] = str(error)
    scores["CIDEr"] = np.array(Cider().compute_score(numbered, hypotheses)[1])
    scores["CIDEr_plain"] = _plain_cider(references, captions)
    try:
        scores["SPICE"] = shared_spice().score(references, captions, progress)["SPICE"]
    except (RuntimeError, FileNotFoundError) as error:
        not_run["SPICE"] = str(error)
    return scores, not_run


def _plain_cider(references: Sequence[Sequence[str]], captions: Sequence[str]) -> np.ndarray:
    cider = CiderD({n: [text.split() for text in own] for n, own in enumerate(references)}, defended=False)
    return np.array([cider(number, [caption.split()])[0] for number, caption in enumerate(captions)])

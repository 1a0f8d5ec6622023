"""All that can be said about a set of captions without a model: one table, and why a score is missing from it."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import fmean
from typing import TypeVar

from coca_lit.evals.samples import is_reference
from coca_lit.metrics.captions import STANDARD, Tokens, score_tokens, tokenize_captions
from coca_lit.metrics.diversity import caption_statistics
from coca_lit.metrics.java.meteor import warm_up
from coca_lit.metrics.java.ptb import ptb_tokenize
from coca_lit.metrics.java.spice import SpiceError, spice

Id = TypeVar("Id", bound=Hashable)


def caption_table(
    references: Mapping[Id, Sequence[str]],
    predictions: Mapping[Id, str],
    domains: Mapping[Id, str | None] | None = None,
    metrics: Sequence[str] = STANDARD,
    tokenize: Callable[[Sequence[str]], list[str]] = ptb_tokenize,
) -> tuple[dict[str, float], dict[str, str]]:
    """All scores by name, and the reason for each that could not be computed. Every Java program runs once.

    Where ``domains`` tells them apart, as in nocaps, the images of each domain are also scored as a set of their own,
    the way the nocaps server does it (CIDEr depends on the set): these scores are called "in-domain/CIDEr" and so on.
    ``metrics`` (SPICE comes on top) and ``tokenize`` are those of ``caption_scores``, which also says what is raised.
    """
    if "METEOR" in metrics:
        warm_up()
    tokens = tokenize_captions(references, predictions, tokenize)
    spices, not_run = _spices(tokens)
    groups = {"": list(references)} | {f"{name}/": ids for name, ids in _by_domain(domains or {}).items()}
    scores: dict[str, float] = {}
    for prefix, ids in groups.items():
        part = score_tokens(tokens.of(ids), metrics) | ({"SPICE": fmean(spices[i] for i in ids)} if spices else {})
        if not prefix:
            part["exact_match"] = exact_match(references, predictions)
            part |= caption_statistics(list(predictions.values()))
        scores |= {f"{prefix}{name}": score for name, score in part.items()}
    return scores, not_run


def exact_match(references: Mapping[Id, Sequence[str]], predictions: Mapping[Id, str]) -> float:
    """Share of captions that equal one of their references, apart from case, blanks and a closing full stop."""
    return sum(is_reference(predictions[key], texts) for key, texts in references.items()) / len(references)


def _spices(tokens: Tokens) -> tuple[dict[Hashable, float], dict[str, str]]:
    """SPICE of each image, or why there is none."""
    try:
        return dict(zip(tokens.references, spice(*tokens), strict=True)), {}
    except SpiceError as error:
        return {}, {"SPICE": str(error)}


def _by_domain(domains: Mapping[Id, str | None]) -> dict[str, list[Id]]:
    groups: dict[str, list[Id]] = {}
    for key, domain in domains.items():
        if domain is not None:
            groups.setdefault(domain, []).append(key)
    return dict(sorted(groups.items()))

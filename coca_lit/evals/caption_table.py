"""All that can be said about a set of captions without a model: one table, and why a score is missing from it."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from coca_lit.evals.captioning import caption_scores
from coca_lit.evals.samples import is_reference
from coca_lit.evals.spice import SpiceError
from coca_lit.evals.statistics import caption_statistics

Id = TypeVar("Id", bound=Hashable)


def caption_table(
    references: Mapping[Id, Sequence[str]],
    predictions: Mapping[Id, str],
    domains: Mapping[Id, str | None] | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """All scores by name, and the reason for each that could not be computed.

    Where ``domains`` tells them apart, as in nocaps, the images of each domain are also scored as a set of their own,
    the way the nocaps server does it (CIDEr depends on the set): these scores are called "in-domain/CIDEr" and so on.
    Raises ValueError as ``caption_scores`` does.
    """
    scores, not_run = _with_spice(references, predictions)
    scores["exact_match"] = exact_match(references, predictions)
    scores |= caption_statistics(list(predictions.values()))
    for domain, ids in _by_domain(domains or {}).items():
        part, _ = _with_spice({key: references[key] for key in ids}, {key: predictions[key] for key in ids})
        scores |= {f"{domain}/{name}": score for name, score in part.items()}
    return scores, not_run


def exact_match(references: Mapping[Id, Sequence[str]], predictions: Mapping[Id, str]) -> float:
    """Share of captions that equal one of their references, apart from case, blanks and a closing full stop."""
    return sum(is_reference(predictions[key], texts) for key, texts in references.items()) / len(references)


def _with_spice(
    references: Mapping[Id, Sequence[str]], predictions: Mapping[Id, str]
) -> tuple[dict[str, float], dict[str, str]]:
    scores = caption_scores(references, predictions)
    try:
        return scores | caption_scores(references, predictions, ("SPICE",)), {}
    except SpiceError as error:
        return scores, {"SPICE": str(error)}


def _by_domain(domains: Mapping[Id, str | None]) -> dict[str, list[Id]]:
    groups: dict[str, list[Id]] = {}
    for key, domain in domains.items():
        if domain is not None:
            groups.setdefault(domain, []).append(key)
    return dict(sorted(groups.items()))

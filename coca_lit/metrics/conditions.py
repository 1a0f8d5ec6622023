"""What a score depends on besides the model. Scores of two models can be compared only where it is the same."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

JUDGE = "judge"  # the setting that names the checkpoint behind CLIPScore; None: each model judges itself


class Conditions(NamedTuple):
    """How a score came about.

    Attributes:
        split: as configured; for readers, since digests tell whether the images are the same.
        images: number of images.
        image_digest: of their ids, in order, see `digest`.
        texts: number of references, candidates of retrieval or prompts of classes.
        text_digest: of these, in order.
        settings: of the evaluation, if the score depends on them: `{"generate.num_beams": 4}`, `{"rerank": 16}`.
    """

    split: str
    images: int
    image_digest: str
    texts: int
    text_digest: str
    settings: Mapping[str, Any]


def digest(items: Iterable[Any]) -> str:
    """16 hexadecimal digits of SHA-256 over the items as JSON."""
    return hashlib.sha256(json.dumps(list(items), default=str).encode()).hexdigest()[:16]


def obstacle(first: Conditions | None, second: Conditions | None) -> str:
    """Why scores under these conditions cannot be compared, in words; empty if they can."""
    if first is None or second is None:
        return "a run does not record what it scored"
    if data := other_data(first, second):
        return data
    keys = [key for key in {**first.settings, **second.settings} if first.settings.get(key) != second.settings.get(key)]
    if keys:
        sides = [", ".join(f"{key}={own.settings.get(key, 'default')}" for key in keys) for own in (first, second)]
        return f"{sides[0]} / {sides[1]}"
    return "each model judges itself" if first.settings.get(JUDGE, "") is None else ""


def other_data(first: Conditions, second: Conditions) -> str:
    """How the images or texts of two scores differ, in words; empty if they are the same."""
    if first.image_digest != second.image_digest:
        sides = [f"{own.images:,} images of {own.split}" for own in (first, second)]
        return " / ".join(sides) if sides[0] != sides[1] else f"{sides[0]}, but not the same ones"
    if first.text_digest != second.text_digest:
        counts = f"{first.texts:,} / {second.texts:,} texts"
        return counts if first.texts != second.texts else f"{first.texts:,} texts, but not the same ones"
    return ""


def same_data(conditions: Iterable[Conditions | None]) -> bool:
    """Whether scores are known to be of the same images and texts; also if there is one score alone, or none."""
    known = list(conditions)
    first = known[0] if known else None
    return all(first is not None and of is not None and not other_data(first, of) for of in known[1:])

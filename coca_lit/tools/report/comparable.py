"""Whether scores of two runs can be compared: only where what they depend on besides the model is the same."""

from collections.abc import Iterable

from coca_lit.metrics.uncertainty import JUDGE, Conditions


def obstacle(first: Conditions | None, second: Conditions | None) -> str:
    """Why scores under these conditions cannot be compared, in words; empty if they can."""
    if first is None or second is None:
        return "a run does not record what it scored"
    data = other_data(first, second)
    if data:
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

"""Errors that a user can fix. Their message is one complete sentence: what was expected, what was found, what to do.

The commands print it and exit with code 1; every other exception is a bug and keeps its traceback.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from operator import ge, gt, le
from typing import Any

LEAST = {"image_size": 1, "batch_size": 1, "num_workers": 0}  # of numbers that commands check before constructors do
NO_SUGGESTION = "."  # the end of a sentence about a name that resembles no known one


class UserError(Exception):
    """A mistake in the input or in the environment, not in the code."""


class ConfigError(UserError):
    """A key, value or combination in the configuration that cannot work."""


class DataError(UserError):
    """Data that cannot be used as they are."""


class DataNotFoundError(DataError):
    """Data that must be on disk and are not there."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit the run."""


class TrainingError(UserError):
    """A training run that cannot continue."""


@contextmanager
def error_context(key: str) -> Iterator[None]:
    """Turns a `TypeError`, `ValueError` or `OSError` raised inside into a `ConfigError` that names `key`."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"{key}: {error}") from error


def why_unreadable(error: Exception) -> str:
    """The reason why `torch.load` refused a file, without PyTorch's advice to run the code in it."""
    text = str(error)
    found = re.search(r"(?:GLOBAL|Unsupported (?:global|class|type)\S*) (?:GLOBAL )?([\w.]+)", text)
    if found:
        return f"it holds code ({found[1]})"
    if "weights_only" in text or not isinstance(error, OSError | RuntimeError):
        return "it is not a file that torch.save writes"
    return (text.splitlines() or [type(error).__name__])[0]


def check_number(
    name: str,
    value: Any,
    *,
    whole: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> None:
    """Raises `ValueError` unless the value is a number, neither infinite nor NaN, within these bounds."""
    bounds = (("of at least", at_least, ge), ("above", above, gt), ("at most", at_most, le))
    given = [(words, bound, fits) for words, bound, fits in bounds if bound is not None]
    kind: Any = Integral if whole else Real
    number = isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf
    if not number or not all(fits(value, bound) for _, bound, fits in given):
        expected = " and ".join(f"{words} {bound}" for words, bound, _ in given)
        what = f"{'whole ' if whole else ''}number {expected}".rstrip()
        raise ValueError(f"{name} must be a {what}, got {value!r}")


def whole_number(name: str, value: Any, *, at_least: float | None = None) -> int:
    """The value, a whole number, as an `int`; configs read 1e6 as a float. Raises `ValueError` as `check_number`."""
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    check_number(name, number, whole=True, at_least=at_least)
    return int(number)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises `ValueError` unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises `ValueError` for an argument that `owner` does not know; the message suggests the right one."""
    known = list(known)
    for name in given:
        if name not in known:
            arguments = ", ".join(known) or "none"
            raise ValueError(f"{owner} has no argument '{name}'{suggest(name, known)} Its arguments: {arguments}")


def suggest(word: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """The end of a sentence about an unknown name: "; did you mean 'NAME'?", or "." if nothing is similar.

    Args:
        aliases: what a user may also write -> the known name that is meant.
    """
    meant = {**(aliases or {}), **{name: name for name in known}}
    folded = {name.lower(): name for name in reversed(meant)}
    close = [word] if word in meant else [folded[name] for name in difflib.get_close_matches(word.lower(), folded, n=1)]
    return f"; did you mean '{meant[close[0]]}'?" if close else NO_SUGGESTION

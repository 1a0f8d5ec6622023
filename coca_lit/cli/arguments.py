"""What a user types, in the form that Hydra reads: words without a key, and braces that are not dictionaries."""

import os
import re
from collections.abc import Sequence

from hydra.core.override_parser.types import Quote, QuotedString

from coca_lit.errors import ConfigError

Positional = str | Sequence[str]  # one key that takes all words as a list, or keys that take a word each, in order

_OVERRIDE = re.compile(r"[+~]*(?:hydra/)?[A-Za-z_][\w.@:-]*=", re.ASCII)
_FLAGS_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun"),
}


def to_overrides(arguments: Sequence[str], positional: Positional = ()) -> list[str]:
    """The arguments with words that name no key given to the keys of `positional`, and with ranges quoted.

    A word is an override if it looks like `key=value` and no file is called so. Whatever follows `--` is a word.

    Raises:
        ConfigError: more words than keys.
    """
    if not positional:
        return [quote_range(argument) for argument in arguments]
    words: list[str] = []
    others: list[str] = []
    for i, argument in enumerate(arguments):
        if argument == "--":
            words += arguments[i + 1 :]
            break
        is_value = i > 0 and arguments[i - 1] in _FLAGS_WITH_VALUE
        is_override = _OVERRIDE.match(argument) and not os.path.lexists(argument)
        (others if is_value or is_override or argument.startswith("-") else words).append(argument)
    return [*map(quote_range, others), *_name(words, positional)]


def quote_range(argument: str) -> str:
    """Quotes a value like /data/{00000..00099}.tar, whose brace Hydra would take for the start of a dictionary."""
    return re.sub(r"""^([^=]+)=([^"'\[]*\{\d+\.\.\d+\}.*)$""", r'\1="\2"', argument)


def quote(word: str) -> str:
    """A string of Hydra's grammar that means `word`, whatever characters it holds."""
    literal = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", word)  # no interpolation
    return QuotedString(literal, Quote.double).with_quotes()


def _name(words: Sequence[str], positional: Positional) -> list[str]:
    if isinstance(positional, str):
        return [f"{positional}=[{','.join(map(quote, words))}]"] if words else []
    if len(words) > len(positional):
        surplus = " ".join(words[len(positional) :])
        keys = " and ".join(key.upper() for key in positional)
        raise ConfigError(f"expected {keys} and key=value, found also '{surplus}': quote a text of several words")
    return [f"{key}={quote(word)}" for key, word in zip(positional, words, strict=False)]

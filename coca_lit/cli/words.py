"""From words as typed to overrides in Hydra's grammar."""

import argparse
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from coca_lit import extensions
from coca_lit.errors import ConfigError, suggest

Positional = str | Sequence[str]  # one key that takes all words as a list, or keys that take one word each, in order

_TEXT_KEYS = re.compile(
    r"(?:name|data_dir|init_from|init_parts\..*|checkpoint|interpolate_with|ckpt_path|output|output_dir|index|images"
    r"|query|spice_jars|roots\..*|data\.selection|data\.records\.(?:images|classes)"
    r"|.*\.(?:root|shards|cache_dir|clip_score_model))"
)
_RANGE = r"\{\d+\.\.\d+\}"
_PRIMITIVE = re.compile(rf"""(?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?:{_RANGE}|[^\[\]{{}}(),"'])+""")
_FLAT = re.compile(r"\[[^\[\](){}\"']*\]|[^\[\](){}\"']*,[^\[\](){}\"']*")
_NUMBER = re.compile(r"(?P<before>^\s*|(?<!\\)[\[,]\s*)(?P<number>[\d_.]+)(?=\s*(?:[,\]]|$))")  # as a whole value
_HOME = re.compile(r"(?:^|(?<=[\[,]))~(?=/)")  # of the value, or of one in a list or a sweep
_OVERRIDE = re.compile(r"[+~]*(?:hydra/)?[A-Za-z_][\w.@:-]*=", re.ASCII)


def parse(arguments: Sequence[str], positional: Positional = ()) -> tuple[argparse.Namespace, list[str]]:
    """Options, and overrides in Hydra's grammar; words without a key go to the keys of `positional`.

    A word is an override if it looks like `key=value` and no file has that name. Whatever follows `--` is a word.

    Raises:
        ConfigError: an option that does not exist, two that exclude each other, or more words than keys.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (("--help", "-h"), ("--version",), ("--resolve",), ("--multirun", "-m")):
        parser.add_argument(*names, action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--config-dir", "-cd", type=Path)
    end = [*arguments, "--"].index("--") if positional else len(arguments)
    options, given = parser.parse_known_args(arguments[:end])
    overrides = []
    words = []
    for word in given:
        if word.startswith("-"):
            raise ConfigError(f"there is no option {word}: see --help")
        if positional and (os.path.lexists(word) or not _OVERRIDE.match(word)):
            words.append(word)
        elif "=" in word or word.startswith("~"):
            overrides.append(to_override(word))
        else:
            raise ConfigError(f"expected key=value, found '{word}'{suggest(word, ['--help', '--version'])}")
    words += arguments[end + 1 :]
    if isinstance(positional, str):
        overrides += [f"{positional}=[{','.join(map(quote, words))}]"] if words else []
    else:
        named = {override.partition("=")[0] for override in overrides}
        free = [key for key in positional if key not in named]
        if len(words) > len(free):
            raise ConfigError(
                f"expected {' and '.join([*map(str.upper, free), 'key=value'])}, found also "
                f"'{' '.join(words[len(free) :])}': quote a text of several words"
            )
        overrides += [f"{key}={quote(word)}" for key, word in zip(free, words, strict=False)]
    if options.config_dir is not None:
        if not options.config_dir.is_dir():
            raise ConfigError(f"--config-dir: there is no folder '{options.config_dir}'")
        if any(override.startswith("hydra.searchpath=") for override in overrides):  # of which Hydra reads the last
            raise ConfigError("--config-dir takes one folder: for several use 'hydra.searchpath=[file://A,file://B]'")
        overrides.append(f"hydra.searchpath=[{quote(f'file://{options.config_dir.absolute()}')}]")
    return options, overrides


def to_override(word: str) -> str:
    """`key=value` with quotes where Hydra's grammar needs them: it knows no letters beyond ASCII and takes the brace of
    /data/{00000..00099}.tar for the start of a dictionary. The ~ of key=~/x, which a shell leaves, becomes the home.
    """
    key, equals, value = word.partition("=")
    value = _HOME.sub(lambda found: os.path.expanduser(found[0]), value)
    word = f"{key}{equals}{value}"
    if value.startswith("\\\\") and _is_text(key):  # a share of Windows, not an escaped backslash
        return f"{key}={quote(value)}"
    if "," in value and (_is_text(key) or "/" in value) and os.path.lexists(value):  # no sweep over its parts
        return f"{key}={quote(value)}"
    forms = [word, f"{key}={_PRIMITIVE.sub(_quote_primitive, value)}"]
    quoted = f"{key}={QuotedString(value, Quote.double).with_quotes()}"
    if re.match(rf"[^\[{{\"']|{_RANGE}", value):  # neither a list, a dictionary nor quoted
        forms.append(quoted)
    for form in forms:
        with suppress(HydraException):
            parsed = OverridesParser.create().parse_override(form).value()
            if not _is_text(key) or form == quoted:
                return form
            if _FLAT.fullmatch(value):  # a list or a sweep
                values = form.partition("=")[2]
                return f"{key}={_NUMBER.sub(lambda found: found['before'] + quote(found['number']), values)}"
            other = isinstance(parsed, int | float) if key == "name" else type(parsed) in (int, float)
            return f"{key}={quote(value)}" if other or (key == "name" and parsed is None) else form
    return word


def _is_text(key: str) -> bool:
    """Whether its value is a text also where it looks like a number, such as a folder of a year."""
    name = key.lstrip("+")
    return _TEXT_KEYS.fullmatch(name) is not None or name in extensions.listed("text_keys")


def _quote_primitive(found: re.Match[str]) -> str:
    """Quotes one value within a list, a dictionary or a sweep; `name: ` before it is the key in a dictionary."""
    text = found[0]
    if found["quoted"] or (text.isascii() and not re.search(_RANGE, text)):
        return text
    key = re.match(r"\s*[A-Za-z_][\w-]*\s*:\s+|\s*", text, re.ASCII)
    start = key.end() if key is not None else 0
    return f"{text[:start]}{QuotedString(text[start:].rstrip(), Quote.double).with_quotes()}"


def quote(word: str) -> str:
    """A string in Hydra's grammar for `word`, with any characters."""
    literal = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", word)  # no interpolation
    return QuotedString(literal, Quote.double).with_quotes()

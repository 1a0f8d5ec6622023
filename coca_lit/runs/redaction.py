"""Masks secrets in everything that a run writes: its config, its command, log lines and error messages.

A secret is recognised by the name of its key, flag or environment variable (`api_key`, `--password`, `HF_TOKEN`), or as
the password or signature in a URL. References such as `${oc.env:HF_TOKEN}` are not secrets and stay as they are.
"""

import logging
import os
import re
import sys
from itertools import pairwise
from typing import Any

from omegaconf import OmegaConf

from coca_lit.reading import printable_lines

HIDDEN = "<hidden>"
_SECRET = (
    r"(?i:(?:api|access|private|secret|signing|encryption)[_-]?key|token|secret|password|passwd|passphrase|pwd"
    r"|credentials?|auth|authorization|signature)|(?<=[_.-])(?i:pat)"
)
# The name may be the last word of a longer one: callbacks.wandb.api_key, http-auth, accessToken, PGPASSWORD.
_BEFORE = r"(?:[_.@/-]|(?<=[a-z0-9])(?=[A-Z])|(?=(?i:passw)))"
_NAME = rf"(?:[\w.@/-]*{_BEFORE})?(?:{_SECRET})"
_KEY = re.compile(_NAME)
# Looked for at the start of a path alone, and a part of a flag or URL is bounded: else a long path takes forever.
_START = r"(?<![\w.@/-])"
_LETTER = r"""[^\s,;}\]&"']"""
_WORD = f"{_LETTER}+"
_ASSIGNMENT = re.compile(
    rf"""(?P<name>{_START}{_NAME}["']?\s*[=:]\s*)(?!["']?\$\{{|(?i:null|none)\b|["']?{HIDDEN})"""
    rf"""(?P<value>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|(?:(?i:bearer|basic)\s+)?{_WORD})"""
)
# A password may have several words: up to the next `name=`, option or end of the line. The first one is bounded: else
# many of them in a row take forever.
_PHRASE = re.compile(
    rf"""(?P<name>{_START}[\w.@/-]*(?i:passw(?:or)?d|passphrase|pwd)\s*[=:]\s*)(?!\$\{{|{HIDDEN})"""
    rf"""(?P<value>{_LETTER}{{1,1000}}+(?:[ \t]+(?![+~-]|[\w.@/-]*[=:]){_WORD})+)"""
)
_FLAG = re.compile(
    rf"""(?P<name>(?<![\w-])--?(?:[\w.@/-]{{0,100}}{_BEFORE})?(?:{_SECRET})(?:["'],)?\s+["']?)"""
    rf"""(?!["'-]|\$\{{|{HIDDEN})(?P<value>{_WORD})"""
)
_QUERY = re.compile(rf"(?P<name>[?&](?i:sig|key|code)=)(?!{HIDDEN})(?P<value>{_WORD})")  # of Azure and Google
# Digits and a slash behind the colon are a port. The last at-sign counts, unless another URL precedes it.
_URL_PASSWORD = re.compile(
    r"""(?P<start>\b[a-zA-Z][\w+.-]{0,40}://[^\s/:]*:)(?!\$\{|\d{1,5}/)(?:(?!://)[^\s"'])+(?=@)"""
)
_SHORTEST = 6  # characters; anything shorter also occurs in harmless words
_FOLDERS = ("PWD", "OLDPWD")  # where the shell is, no passwords


def redact(text: str) -> str:
    """`text` without secrets: values of `name=value`, `name: value`, `"name": "value"` and `--name value`, passwords
    and signatures in URLs, and, wherever they occur, the values of secret environment variables and of secrets typed
    with the command.
    """
    typed = [word.lstrip("+-").partition("=")[::2] for word in sys.argv[1:]]
    flags = [(flag.lstrip("-"), value) for flag, value in pairwise(sys.argv[1:]) if flag.startswith("-")]
    for name, value in (*os.environ.items(), *typed, *flags):
        if len(value) >= _SHORTEST and name not in _FOLDERS and _KEY.fullmatch(name) and "${" not in value:
            text = text.replace(value, HIDDEN)
    text = _URL_PASSWORD.sub(rf"\g<start>{HIDDEN}", text)
    for pattern in (_QUERY, _FLAG, _PHRASE, _ASSIGNMENT):
        text = pattern.sub(_hide_value, text)
    return text


def mask(node: Any, secret: bool = False) -> Any:
    """Nested plain values with every secret replaced; with `secret`, all values are secrets."""
    if isinstance(node, dict):
        return {
            key: mask(child, (secret or bool(_KEY.fullmatch(str(key)))) and key != "_target_")
            for key, child in node.items()
        }
    if isinstance(node, list):
        return [mask(child, secret) for child in node]
    if secret and node not in (None, "") and not isinstance(node, bool) and "${" not in str(node):
        return HIDDEN
    return redact(node) if isinstance(node, str) else node


def masked_yaml(config: Any, resolve: bool = False) -> str:
    """A config as YAML without its secrets. Without `resolve`, interpolations are written as they stand."""
    values = OmegaConf.to_container(config, resolve=resolve) if OmegaConf.is_config(config) else config
    return OmegaConf.to_yaml(OmegaConf.create(mask(values)))


class SecretFilter(logging.Filter):
    """Masks secrets and control characters in log records; see `conf/hydra/job_logging/masked.yaml`."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = printable_lines(redact(record.getMessage()))
        record.args = ()
        return True


def _hide_value(found: re.Match[str]) -> str:
    quote = found["value"][0] if found["value"][0] in "\"'" else ""
    return f"{found['name']}{quote}{HIDDEN}{quote}"

"""Masks secrets in everything that a run writes: its config, its command, log lines and error messages.

A secret is recognised by the name of its key or environment variable (`api_key`, `HF_TOKEN`, `accessToken`), or as the
password in a URL. References such as `${oc.env:HF_TOKEN}` are not secrets and stay as they are.
"""

import logging
import os
import re
import sys
from typing import Any

from omegaconf import OmegaConf

HIDDEN = "<hidden>"
_SECRET = (
    r"(?i:(?:api|access|private|secret|signing|encryption)[_-]?key|token|secret|password|passwd|passphrase|pwd"
    r"|credentials?|auth|authorization)|(?<=[_.-])(?i:pat)"
)
# The name may be the last word of a longer one: callbacks.wandb.api_key, http-auth, accessToken, PGPASSWORD.
_NAME = rf"(?:[\w.@/-]*(?:[_.@/-]|(?<=[a-z0-9])(?=[A-Z])|(?=(?i:passw))))?(?:{_SECRET})"
_KEY = re.compile(_NAME)
_ASSIGNMENT = re.compile(
    rf"""(?P<name>(?<![\w-]){_NAME}["']?\s*[=:]\s*)(?!["']?\$\{{|(?i:null|none)\b|["']?{HIDDEN})"""
    r"""(?P<value>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|(?:(?i:bearer|basic)\s+)?[^\s,;}\]&"']+)"""
)
_URL_PASSWORD = re.compile(r"(?P<start>\b[a-zA-Z][\w+.-]*://[^\s/:@]*:)(?!\$\{)[^\s/@]+(?=@)")
_SHORTEST = 6  # characters; anything shorter also occurs in harmless words
_FOLDERS = ("PWD", "OLDPWD")  # where the shell is, no passwords


def redact(text: str) -> str:
    """`text` without secrets: values of `name=value`, `name: value` and `"name": "value"`, passwords in URLs, and the
    values of secret environment variables and of secrets typed with the command, wherever they occur.
    """
    typed = (word.lstrip("+").partition("=")[::2] for word in sys.argv[1:])
    for name, value in (*os.environ.items(), *typed):
        if len(value) >= _SHORTEST and name not in _FOLDERS and _KEY.fullmatch(name) and "${" not in value:
            text = text.replace(value, HIDDEN)
    return _ASSIGNMENT.sub(_hide_value, _URL_PASSWORD.sub(rf"\g<start>{HIDDEN}", text))


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
    """Masks secrets in log records; see `conf/hydra/job_logging/masked.yaml`."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        return True


def _hide_value(found: re.Match[str]) -> str:
    quote = found["value"][0] if found["value"][0] in "\"'" else ""
    return f"{found['name']}{quote}{HIDDEN}{quote}"

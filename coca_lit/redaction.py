"""No secret is printed or lands in a run folder, whether a config holds it or takes it from the environment.

A secret is known by the name of its key or environment variable, such as `api_key` or `HF_TOKEN`.
"""

import os
import re
from typing import Any

from omegaconf import OmegaConf

HIDDEN = "<hidden>"
_NAME = r"(?:[\w.@/-]*[_.])?(?:api_?key|access_?key|private_?key|token|secret|password|passwd|credentials?)"
_KEY = re.compile(_NAME, re.IGNORECASE)
_ASSIGNMENT = re.compile(rf"""(\b{_NAME}\s*[=:]\s*)(?!['"]?\$\{{|null\b)[^\s,}}\]]+""", re.IGNORECASE)
_to_yaml = OmegaConf.to_yaml


def redact_configs() -> None:
    """From now on no YAML that OmegaConf writes holds a secret. Hydra prints and saves configs at half a dozen places,
    some before any code of ours runs, and has no hook for that; all of them call this one function.
    """
    OmegaConf.to_yaml = staticmethod(_redacted_yaml)  # type: ignore[method-assign]  # see above


def redact(text: str) -> str:
    """`text` without the values of secret `key=value` and `key: value` pairs and of secret environment variables."""
    text = _ASSIGNMENT.sub(rf"\1{HIDDEN}", text)
    for name, value in os.environ.items():
        if len(value) >= 6 and _KEY.fullmatch(name):  # a shorter one would be found in harmless words
            text = text.replace(value, HIDDEN)
    return text


def _redacted_yaml(cfg: Any, *, resolve: bool = False, sort_keys: bool = False) -> str:
    plain = OmegaConf.to_container(cfg if OmegaConf.is_config(cfg) else OmegaConf.create(cfg), resolve=resolve)
    return redact(_to_yaml(OmegaConf.create(_hide(plain)), sort_keys=sort_keys))


def _hide(node: Any, key: Any = "") -> Any:
    if isinstance(node, dict):
        return {name: _hide(child, name) for name, child in node.items()}
    if isinstance(node, list):
        return [_hide(child, key) for child in node]
    is_literal = isinstance(node, str | int) and node and not str(node).startswith("${")
    return HIDDEN if is_literal and _KEY.fullmatch(str(key)) else node

"""No secret is printed or lands in a run folder, whether a config holds it or takes it from the environment.

A secret is known by the name of its key or environment variable, such as `api_key` or `HF_TOKEN`.
"""

import logging
import os
import re
import sys
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

HIDDEN = "<hidden>"
_NAME = r"(?:[\w.@/-]*[_.])?(?:api_?key|access_?key|private_?key|token|secret|password|passwd|credentials?)"
_KEY = re.compile(_NAME, re.IGNORECASE)
_ASSIGNMENT = re.compile(rf"""(\b{_NAME}\s*[=:]\s*)(?!['"]?\$\{{|null\b)[^\s,}}\]]+""", re.IGNORECASE)
_to_yaml, _record = OmegaConf.to_yaml, logging.getLogRecordFactory()


def redact_configs() -> None:
    """From now on no YAML that OmegaConf writes holds a secret. Hydra prints and saves configs at half a dozen places,
    some before any code of ours runs, and has no hook for that; all of them call this one function.
    """
    OmegaConf.to_yaml = staticmethod(_redacted_yaml)  # type: ignore[method-assign]  # see above


def redact_overrides() -> None:
    """From now on Hydra prints no override that holds a secret: launchers log those of every job, and before an error
    all of them are written to standard error, where no more than the error itself is wanted.
    """
    logging.setLogRecordFactory(_redacted_record)
    JobReturn.return_value = property(_value_or_error, _keep_value)  # type: ignore[method-assign,assignment]


def redact(text: str) -> str:
    """`text` without the values of secret `key=value` and `key: value` pairs, of secret environment variables and of
    those that were typed with the command.
    """
    typed = (word.lstrip("+").partition("=")[::2] for word in sys.argv[1:])
    for name, value in (*os.environ.items(), *typed):
        # A shorter one would be found in harmless words.
        if len(value) >= 6 and _KEY.fullmatch(name) and not value.startswith("${"):
            text = text.replace(value, HIDDEN)
    return _ASSIGNMENT.sub(rf"\1{HIDDEN}", text)


def _redacted_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = _record(*args, **kwargs)
    if record.name.startswith("hydra"):
        record.msg, record.args = redact(record.getMessage()), ()
    return record


def _value_or_error(job: JobReturn) -> Any:
    if job.status is JobStatus.FAILED:
        raise job._return_value
    return job._return_value


def _keep_value(job: JobReturn, value: Any) -> None:
    job._return_value = value


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

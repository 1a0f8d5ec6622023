"""Errors that a user can mend. Their message is one complete sentence: what was expected, what was found, what to do.

The commands print it and exit with code 1; every other exception is a bug and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager


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
    """A training run that cannot go on."""


@contextmanager
def error_context(key: str) -> Iterator[None]:
    """Turns a `TypeError` or `ValueError` raised inside into a `ConfigError` that names `key`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from error

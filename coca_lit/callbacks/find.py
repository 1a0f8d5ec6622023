"""The callbacks of a trainer by their kind."""

from typing import TypeVar

import lightning.pytorch as L

Kind = TypeVar("Kind", bound=L.Callback)


def callbacks_of(trainer: L.Trainer, kind: type[Kind]) -> list[Kind]:
    """The trainer's callbacks of a class, in their order."""
    return [callback for callback in getattr(trainer, "callbacks", ()) if isinstance(callback, kind)]

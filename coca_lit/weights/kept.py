"""Objectives that are kept with the model: what was trained beside the network and is of use after the training, such
as a classifier. A file holds their tensors as `objectives.NAME.…`, and for each the registered name of its class with
its `config`.
"""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from coca_lit.models import CoCa
from coca_lit.models.init import Uninitialised
from coca_lit.models.registry import OBJECTIVES
from coca_lit.reading import printable
from coca_lit.weights.computation import misfit
from coca_lit.weights.intact import without_memory

log = logging.getLogger(__name__)


def kept_objectives(described: Any, tensors: Mapping[str, Tensor], net: CoCa, path: Path) -> dict[str, Any]:
    """The objectives of a file, by name and in evaluation mode; without those whose class is not registered, which are
    named in a warning.

    Args:
        described: what the file says of each.
        tensors: of all objectives, without the prefix.

    Raises:
        ValueError: one is damaged, or does not fit the network.
    """
    found: dict[str, Any] = {}
    try:
        for name, description in described.items():
            if not isinstance(description, dict):
                raise TypeError(f"it is described by a {type(description).__name__}")
            config = dict(description)
            kind = config.pop("kind", "")
            if kind in OBJECTIVES:
                own = {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}
                found[name] = _rebuilt(kind, config, own, net)
            elif kind:
                log.warning(
                    "the objective '%s' in '%s' is left out: nothing here is registered as '%s'; install its package, "
                    "or name the module that registers it in imports",
                    *map(printable, (str(name), str(path), str(kind))),
                )
    except Exception as error:  # of any kind: a stranger's values reach constructors
        reason = str(error).partition("\n")[0]
        raise ValueError(f"an objective in '{path}' is damaged: {reason}; save the checkpoint again") from error
    return found


def _rebuilt(kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], net: CoCa) -> nn.Module:
    objective_class: Any = OBJECTIVES.get(kind)

    def build() -> Any:
        objective: Any = objective_class.rebuilt(config)
        objective.build(net)
        return objective

    guest = OBJECTIVES.is_guest(kind)
    if not guest:
        reason = misfit(without_memory(build).state_dict(), tensors)  # before memory is taken
        if reason is not None:
            raise ValueError(reason)
    with nullcontext() if guest else Uninitialised():  # a guest may derive what no file holds from its first values
        objective = build()
    objective.load_state_dict(tensors)
    return objective.to(net.device).eval()


def class_of(objective: nn.Module) -> Any:
    """The class as it is registered; sharding derives another one."""
    kind = type(objective)
    return kind.__bases__[1] if issubclass(kind, FSDPModule) else kind


def described_objectives(objectives: Any) -> dict[str, dict[str, Any]]:
    """What a file says of objectives that are kept, by name; nothing of those whose class is not registered."""
    found: dict[str, dict[str, Any]] = {}
    for name, objective in objectives.items():
        registered = OBJECTIVES.name_of(class_of(objective))
        if registered is not None:
            found[name] = {"kind": OBJECTIVES.spec(registered), **objective.config}
    return found

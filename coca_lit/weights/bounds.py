"""A file takes no more memory and time than its size justifies, whatever it claims.

Tensors are as large as what is stored of them, and a model is first built without memory: it must not have more
parameters than its file has tensors, nor more numbers than they hold.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

Module = TypeVar("Module", bound=nn.Module)

SHARED = 2  # how often what is stored may be used, as by tied weights
SPARE = 2**25  # numbers of tables that are built and not stored: masks, angles of rotary positions
MAX_PATCHES = 2**16  # of an image of any shape: 4,096 pixels squared in patches of 16
MAX_CONTEXT = 2**16  # tokens of a text
MAX_VALUES = 10**6  # in the description of a model; the words of a tokenizer are the most


def check_stored(tensors: Mapping[str, Tensor]) -> None:
    """Raises `ValueError` unless the tensors are ordinary ones whose numbers are stored."""
    storages: dict[int, int] = {}
    claimed = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.numel():
            raise ValueError(f"'{name}' is empty or no ordinary tensor")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        claimed += tensor.nbytes
    if claimed > SHARED * sum(storages.values()):
        raise ValueError(f"its tensors claim {claimed:,} bytes, and {sum(storages.values()):,} are stored")


def check_plain(config: Any) -> None:
    """Raises `ValueError` unless a description of a model is plain values, not too many and not nested deeply: a pickle
    of a few bytes can hold a list that holds another one twice, and so on.
    """
    level, count = [config], 0
    for _ in range(8):
        count += len(level)
        if count > MAX_VALUES:
            raise ValueError(f"its description of a model has more than {MAX_VALUES:,} values")
        if other := [node for node in level if not isinstance(node, dict | list | tuple | str | int | float | None)]:
            raise ValueError(f"its description of a model holds a {type(other[0]).__name__}")
        dicts = [node for node in level if isinstance(node, dict)]
        lists = [node for node in level if isinstance(node, list | tuple)]
        level = [child for node in (*lists, *dicts, *(node.values() for node in dicts)) for child in node]
        if not level:
            return
    raise ValueError("its description of a model is nested too deeply")


def without_memory(make: Callable[[], Module], tensors: Mapping[str, Tensor]) -> Module:
    """What `make` builds for the tensors of a file, on the device "meta".

    Raises:
        RuntimeError: it is larger than they are.
    """
    most, found = 2 * len(tensors) + 2048, 0  # some parts are built and replaced; as many take no time

    def count(*_: object) -> None:
        nonlocal found
        found += 1
        if found > most:
            raise RuntimeError(f"the model has more than {most} tensors, and the file {len(tensors)}")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = make()
    finally:
        hook.remove()
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(tensor.numel() for tensor in tensors.values())
    if needed > held + SPARE:
        raise RuntimeError(f"the model has {needed:,} numbers, and the file {held:,}")
    return model

"""State of metrics whose samples have an id: gathered over processes by torchmetrics, each sample counted once.

torchmetrics gathers tensors, so what belongs to a sample (ids, texts, numbers) is kept as lines of JSON in a tensor of
bytes. Samplers of distributed training repeat samples to fill the last batch; of rows with the same id one counts. Rows
are sorted by id, so a score depends neither on the number of processes nor on the order of the samples.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

Id = int | str


class RowMetric(Metric):
    """A metric that keeps rows of samples. Call `update` for each batch and `compute` at the end; `forward`, which
    scores every batch by itself, makes no sense for scores of a whole set.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._dtypes: dict[str, torch.dtype] = {}

    def add_rows(self, name: str, dtype: torch.dtype = torch.uint8) -> None:
        """A state for `append`: rows of plain values as bytes, or numbers of another type."""
        self._dtypes[name] = dtype
        self.add_state(name, default=[], dist_reduce_fx="cat")

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As torchmetrics, also where a process has seen no sample: all must gather tensors of one type."""
        for name, dtype in self._dtypes.items():
            if not len(getattr(self, name)):
                setattr(self, name, [torch.empty(0, dtype=dtype, device=self.device)])
        super().sync(*args, **kwargs)

    def append(self, name: str, rows: Iterable[Any] | Tensor) -> None:
        """Adds rows of plain values, or numbers, to a state."""
        if not isinstance(rows, Tensor):
            text = "".join(f"{json.dumps(row)}\n" for row in rows)
            rows = torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())
        getattr(self, name).append(rows.to(self.device))

    def rows(self, name: str) -> list[Any]:
        """All rows of plain values of a state."""
        state = getattr(self, name)
        text = dim_zero_cat(state).cpu().numpy().tobytes() if len(state) else b""
        return [json.loads(line) for line in text.splitlines()]


def plain_ids(ids: Sequence[Id] | Tensor, count: int) -> list[Id]:
    """The ids of `count` samples as numbers and strings.

    Raises:
        ValueError: another number of ids, or ids of another type.
    """
    plain = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if len(plain) != count or not all(isinstance(i, int | str) for i in plain):
        raise ValueError(f"expected an id (int or str) for each of {count} samples, got {len(plain)}: {plain[:5]}")
    return plain


def in_order(id: Id) -> tuple[bool, Any]:
    """Sort key of ids: numbers come before strings."""
    return isinstance(id, str), id

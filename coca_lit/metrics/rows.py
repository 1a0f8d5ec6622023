"""State of metrics whose samples have an id: gathered over processes by torchmetrics, each sample counted once.

torchmetrics gathers tensors, so what belongs to a sample (ids, texts, numbers) is kept as lines of JSON in a tensor of
bytes. Samplers of distributed training repeat samples to fill the last batch; of rows with the same id one counts. Rows
are sorted by id, so a score depends neither on the number of processes nor on the order of the samples.
"""

import json
from collections.abc import Sequence
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

    kept: list[Tensor] | Tensor  # rows as bytes; one tensor once it is gathered

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("kept", default=[], dist_reduce_fx="cat")

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As torchmetrics, also where a process has seen no sample: all must gather tensors of one type."""
        if not len(self.kept):
            self.kept = [torch.empty(0, dtype=torch.uint8, device=self.device)]
        super().sync(*args, **kwargs)

    def append(self, ids: Sequence[Id] | Tensor, *columns: Sequence[Any]) -> None:
        """Adds a row of plain values for each id."""
        plain = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        text = "".join(f"{json.dumps(row)}\n" for row in zip(plain, *columns, strict=True))
        assert isinstance(self.kept, list)
        self.kept.append(torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy()).to(self.device))

    def rows(self) -> dict[Id, list[Any]]:
        """The values of all samples by id, numbers before strings."""
        text = dim_zero_cat(self.kept).cpu().numpy().tobytes() if len(self.kept) else b""
        by_id = {id: row for id, *row in map(json.loads, text.splitlines())}
        return {id: by_id[id] for id in sorted(by_id, key=lambda id: (isinstance(id, str), id))}

"""How the rows of a batch of texts lie in memory: padded to a grid, or packed one text after another.

Captions have a dozen tokens and now and then seventy. Everything in a transformer but attention works on single rows,
so packed rows make its cost follow the number of tokens; attention alone sees the grid, or one text at a time.
"""

import torch
from torch import Tensor

# Packing moves the rows into the grid and back in every attention: with less padding that costs more than it saves.
WORTHWHILE_PADDING = 0.1


class Layout:
    """The layout of B texts of different lengths.

    padded: (B, L, …), L the longest length. packed: (N, …), N the sum of the lengths.

    Args:
        lengths: (B,) rows of each text.
        packed: None packs when more than a tenth of the grid would be padding.
        max_length: width of the grid, if it must not depend on values as in an exported graph.

    Attributes:
        positions: (L,), 0 … L - 1.
        mask: (B, L), False where the grid is padding.
        cpu_lengths: the lengths of packed texts on a CPU, where reading them waits for nothing; else None.
    """

    def __init__(self, lengths: Tensor, packed: bool | None = None, max_length: int | None = None) -> None:
        self.batch_size = lengths.shape[0]
        self.max_length = max_length if max_length is not None else int(lengths.max()) if self.batch_size else 0
        self.positions = torch.arange(self.max_length, device=lengths.device)
        self.mask = self.positions < lengths[:, None]
        if packed is None:
            padding = 1 - int(lengths.sum()) / max(self.mask.numel(), 1)
            packed = padding > WORTHWHILE_PADDING
        self.packed = packed
        self.cpu_lengths: list[int] | None = lengths.tolist() if packed and lengths.device.type == "cpu" else None
        self._starts = lengths.cumsum(0) - lengths  # (B,), packed row at which each text begins
        self._rows = self.mask.flatten().nonzero().squeeze(1) if packed else None  # (N,), places in the grid

    def pack(self, grid: Tensor) -> Tensor:
        """(B, L, …) -> (N, …) if the layout is packed, else the grid unchanged."""
        return grid if self._rows is None else grid.flatten(0, 1).index_select(0, self._rows)

    def unpack(self, rows: Tensor) -> Tensor:
        """(N, …) -> (B, L, …) with zeros where there is no row; a grid is returned unchanged."""
        if self._rows is None:
            return rows
        grid = rows.new_zeros(self.batch_size * self.max_length, *rows.shape[1:])
        return grid.index_copy(0, self._rows, rows).unflatten(0, (self.batch_size, self.max_length))

    def gather_at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """The row at one position (B,) of each text: (B, …)."""
        if self._rows is None:
            return rows[torch.arange(self.batch_size, device=positions.device), positions]
        return rows[self._starts + positions]

    def compact(self, rows: Tensor, where: Tensor) -> Tensor:
        """The rows at which the boolean grid `where` (B, L) is True, text after text: (M, …)."""
        return rows[self.pack(where)]

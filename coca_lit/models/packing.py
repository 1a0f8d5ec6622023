"""How the rows of a batch of texts lie in memory: padded to a grid, or packed one text after another.

Captions have a dozen tokens and now and then seventy. Everything in a transformer but attention works on single rows,
so packed rows make its cost follow the number of tokens; attention alone sees the grid, or the texts one by one.
"""

import torch
from torch import Tensor

# Packing moves the rows into the grid and back in every attention: below this share of padding that costs more than
# the padding does.
WORTHWHILE_PADDING = 0.1


class Layout:
    """The layout of B texts of different lengths.

    padded: (B, L, …), L the longest length. packed: (N, …), N the sum of the lengths.

    Args:
        lengths: (B,) rows of each text.
        packed: None packs when more than a tenth of the grid would be padding.
        longest: width of the grid if it must not depend on values, as in an exported graph.
    """

    def __init__(self, lengths: Tensor, packed: bool | None = None, longest: int | None = None) -> None:
        self.texts = lengths.shape[0]
        self.longest = longest if longest is not None else int(lengths.max()) if self.texts else 0
        self.positions = torch.arange(self.longest, device=lengths.device)  # (L,)
        self.mask = self.positions < lengths[:, None]  # (B, L), False where the grid is padding
        if packed is None:
            padding = 1 - int(lengths.sum()) / max(self.mask.numel(), 1)
            packed = padding > WORTHWHILE_PADDING
        self.packed = packed
        # On a CPU, where it costs no waiting: rows of each packed text, for attention that goes text by text.
        self.lengths: list[int] | None = lengths.tolist() if packed and lengths.device.type == "cpu" else None
        self._starts = lengths.cumsum(0) - lengths  # (B,), packed row at which each text begins
        self._rows = self.mask.flatten().nonzero().squeeze(1) if packed else None  # (N,), places in the grid

    def pack(self, grid: Tensor) -> Tensor:
        """(B, L, …) -> (N, …) where the layout is packed, else the grid as it is."""
        return grid if self._rows is None else grid.flatten(0, 1).index_select(0, self._rows)

    def unpack(self, rows: Tensor) -> Tensor:
        """(N, …) -> (B, L, …), zeros where there is no row; a grid is returned as it is."""
        if self._rows is None:
            return rows
        grid = rows.new_zeros(self.texts * self.longest, *rows.shape[1:])
        return grid.index_copy(0, self._rows, rows).unflatten(0, (self.texts, self.longest))

    def gather_at(self, rows: Tensor, places: Tensor) -> Tensor:
        """The row at one place (B,) of each text: (B, …)."""
        if self._rows is None:
            return rows[torch.arange(self.texts, device=places.device), places]
        return rows[self._starts + places]

    def compact(self, rows: Tensor, where: Tensor) -> Tensor:
        """The rows at which the boolean grid `where` (B, L) is True, text after text: (M, …)."""
        return rows[self.pack(where)]

"""How the rows of a batch of texts lie in memory: padded to a grid, or packed one text after another; and in generation
the keys and values of what is written already.

Captions have a dozen tokens and now and then seventy. Everything in a transformer but attention works on single rows,
so packed rows make its cost follow the number of tokens; attention alone sees the grid, or one text at a time.

Lengths stay on the host, and everything that depends on them is computed there: a GPU whose memory is read has to
finish all its work first.
"""

from typing import Any

import torch
from torch import Tensor

# Packing moves the rows into the grid and back in every attention: with less padding that costs more than it saves.
WORTHWHILE_PADDING = 0.1


class Layout:
    """The layout of B texts of different lengths.

    padded: (B, L, …), L the longest length. packed: (N, …), N the sum of the lengths.

    Args:
        lengths: (B,) rows of each text, on the host.
        packed: None packs when more than a tenth of the grid would be padding.
        max_length: width of the grid, if it must not depend on values as in an exported graph.
        device: of the rows; None for the host.

    Attributes:
        positions: (L,), 0 … L - 1, on the host.
        mask: (B, L), False where the grid is padding, on the host.
        cpu_lengths: the lengths of packed texts whose rows are on a CPU; else None.
        ends: (B + 1,) int32, packed row at which each text begins, and the end of the last, if on CUDA; else None.
    """

    def __init__(
        self,
        lengths: Tensor,
        packed: bool | None = None,
        max_length: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device = lengths.device if device is None else device
        self.batch_size = lengths.shape[0]
        if max_length is None:
            max_length = int(lengths.max()) if self.batch_size else 0
        self.max_length = max_length
        self.positions = torch.arange(self.max_length)
        self.mask = self.positions < lengths[:, None]
        if packed is None:
            padding = 1 - int(lengths.sum()) / max(self.mask.numel(), 1)
            packed = padding > WORTHWHILE_PADDING
        self.packed = packed
        self.cpu_lengths: list[int] | None = lengths.tolist() if packed and self.device.type == "cpu" else None
        self._starts = lengths.cumsum(0) - lengths  # (B,), packed row at which each text begins
        self._rows: Tensor | None = None  # (N,), places in the grid
        self.ends: Tensor | None = None
        if packed:
            self._rows = to_device(self.mask.flatten().nonzero().squeeze(1), self.device)
            if self.device.type == "cuda":
                ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
                self.ends = to_device(ends, self.device)

    def pack(self, grid: Tensor) -> Tensor:
        """(B, L, …) -> (N, …) if the layout is packed, else the grid unchanged."""
        return grid if self._rows is None else _Rows.apply(grid.flatten(0, 1), self._rows)

    def pack_on_host(self, grid: Tensor) -> Tensor:
        """`pack` for a grid that is on the host, and stays there."""
        return grid[self.mask] if self.packed else grid

    def pack_to_device(self, grid: Tensor) -> Tensor:
        """`pack` for a grid that is on the host, whose rows are wanted on the device."""
        return to_device(self.pack_on_host(grid).contiguous(), self.device)

    def row_positions(self) -> Tensor:
        """The position of each row in its text, on the device: (N,) of packed rows, (L,) of a grid."""
        if not self.packed:
            return to_device(self.positions, self.device)
        return self.pack_to_device(self.positions.expand(self.batch_size, -1))

    def unpack(self, rows: Tensor) -> Tensor:
        """(N, …) -> (B, L, …) with zeros where there is no row; a grid is returned unchanged."""
        if self._rows is None:
            return rows
        grid = rows.new_zeros(self.batch_size * self.max_length, *rows.shape[1:])
        return grid.index_copy(0, self._rows, rows).unflatten(0, (self.batch_size, self.max_length))

    def gather_at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """The row at one position (B,), on the host, of each text: (B, …)."""
        if self._rows is None:
            return rows[torch.arange(self.batch_size, device=rows.device), to_device(positions, rows.device)]
        return _Rows.apply(rows, to_device(self._starts + positions, rows.device))

    def compact(self, rows: Tensor, where: Tensor) -> Tensor:
        """The rows at which the boolean grid `where` (B, L), on the host, is True, text after text: (M, …)."""
        kept = self.pack_on_host(where)
        if self._rows is None:
            kept = kept.flatten()
            rows = rows.flatten(0, 1)
        return rows if kept.all() else _Rows.apply(rows, to_device(kept.nonzero().squeeze(1), rows.device))


def expect_tokens(tokens: Tensor) -> None:
    """Raises `TypeError` for texts in place of their ids, and `ValueError` for ids of another shape than (B, L)."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a tensor, got {type(tokens).__name__}: use model.tokenizer(texts)")
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have the shape (batch, length), got {tuple(tokens.shape)}")


def expect_to_fit(longest: int, context_length: int) -> None:
    """Raises `ValueError` for a text of more tokens than the model can read."""
    if longest > context_length:
        raise ValueError(f"texts of {longest} tokens do not fit the context of {context_length}")


def text_lengths(tokens: Tensor, pad_id: int) -> Tensor:
    """Number of tokens (B,) up to the last one that is not padding, at least 1. Ids equal to `pad_id` inside a text
    count as text.
    """
    positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return (positions * (tokens != pad_id)).amax(dim=1).clamp(min=1)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. One of the host is not waited for: the copy runs from pinned memory. It must not be
    expanded, as a pinned copy has its strides.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.is_cpu else x.to(device)


class _Rows(torch.autograd.Function):
    """Different rows of a tensor. Their gradients are copied to where they belong; `index_select` would add them, on a
    GPU one atomic operation per number.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.count, *gradient.shape[1:]).index_copy_(0, rows, gradient), None


class KVCache:
    """Keys and values of one causal attention layer during generation; positions are appended, rows can be selected.

    R rows of captions, H heads, D width of all heads.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.used = 0
        self._keys_values: Tensor | None = None  # (2, R, H, max_length, D/H)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (R, H, t, D/H) of new positions and returns keys and values of all positions so far."""
        if self._keys_values is None:
            rows, heads, _, width = keys.shape
            self._keys_values = keys.new_empty(2, rows, heads, self.max_length, width)
        end = self.used + keys.shape[2]
        self._keys_values[0, :, :, self.used : end] = keys
        self._keys_values[1, :, :, self.used : end] = values
        self.used = end
        return self._keys_values[0, :, :, :end], self._keys_values[1, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows, in that order; a row may appear several times."""
        if self._keys_values is None:
            return
        written = self._keys_values[:, rows, :, : self.used]
        if len(rows) != self._keys_values.shape[1]:
            _, _, heads, _, width = self._keys_values.shape
            self._keys_values = written.new_empty(2, len(rows), heads, self.max_length, width)
        self._keys_values[:, :, :, : self.used] = written

"""Keys and values of the positions that are written already, during generation.

R rows of captions, H heads, D width of all heads.
"""

from torch import Tensor


class KVCache:
    """Keys and values of one causal attention layer during generation; positions are appended, rows can be selected."""

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

    def storage(self) -> Tensor:
        """Keys and values (2, R, H, max_length, D/H) of all positions, 0 for those to come."""
        assert self._keys_values is not None
        self._keys_values[:, :, :, self.used :] = 0
        return self._keys_values


class StaticKVCache:
    """A cache whose shapes do not depend on how many positions are written: `append` returns all, and a mask must hide
    the rest.
    """

    def __init__(self, keys_values: Tensor, used: Tensor) -> None:
        self.keys_values = keys_values  # (2, R, H, max_length, D/H)
        self.used = used  # (1,)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (R, H, 1, D/H) at position `used`."""
        self.keys_values[0].index_copy_(2, self.used, keys)
        self.keys_values[1].index_copy_(2, self.used, values)
        return self.keys_values[0], self.keys_values[1]


Cache = KVCache | StaticKVCache

"""Writing with shapes that never change, for `torch.compile` and CUDA graphs: the step of a GPU.

The caches hold `max_length` positions from the start and a mask hides those to come, so one compiled graph serves every
step and every batch of the same size. Nothing in the step waits for the device. Captions that end stay in the batch
until all have ended; strategies do not notice, because `StaticDecoding` keeps their rows in the places that they had.

The tests compile this path on a CPU and compare its captions with those of `Decoding`; it has not been run on a GPU.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coca_lit.models.generation.state import Decoding
from coca_lit.models.layers import StaticKVCache
from coca_lit.models.text import Decoder, TextTower

if TYPE_CHECKING:
    from coca_lit.models.coca import CoCa

Step = Callable[..., Tensor]  # as `static_step`


def static_step(
    text: TextTower,
    decoder: Decoder,
    tokens: Tensor,
    position: Tensor,
    image_keys_values: list[tuple[Tensor, Tensor]],
    storage: list[Tensor],
) -> Tensor:
    """Logits (R, V), in float32, of what follows the tokens (R, 1), which stand at the position (1,).

    `storage` are keys and values (2, R, H, L, D/H) of the self-attention layers, text tower first; the step adds those
    of the tokens in place.
    """
    mask = (torch.arange(storage[0].shape[3], device=position.device) <= position)[None, None, None]  # (1, 1, 1, L)
    caches: list[Any] = [StaticKVCache(keys_values, position) for keys_values in storage]
    states = text.step(tokens, caches[: len(text.blocks)], mask)
    hidden = decoder.step(states, image_keys_values, caches[len(text.blocks) :], mask)
    return decoder.vocabulary(hidden[:, -1]).float()


class StaticDecoding(Decoding):
    """A `Decoding` whose arrays keep their places. The beginning is still read with its own shape."""

    def __init__(self, model: "CoCa", image_tokens: Tensor, max_length: int, step: Step = static_step) -> None:
        super().__init__(model, image_tokens, max_length)
        self._step = step
        self._places: Tensor | None = None  # where the rows are that are still written (r,)

    def begin(self, tokens: Tensor, captions: int) -> Tensor:
        logits = super().begin(tokens, captions)
        caches = (*self._text_caches, *self._decoder_caches)
        self._storage = [cache.whole() for cache in caches]
        self._position = torch.tensor([tokens.shape[1]], device=tokens.device)
        self._captions = captions
        self._rows = len(tokens) * captions
        self._places = torch.arange(self._rows, device=tokens.device)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        if self._places is None:
            return super().step(tokens)
        spread = tokens.new_zeros(self._rows, 1)
        spread[self._places] = tokens
        logits = self._step(self._text, self._decoder, spread, self._position, self._image_keys_values, self._storage)
        self._position += 1
        return logits[self._places]

    def select(self, rows: Tensor, images: Tensor | None = None) -> None:
        """Moves rows among the places of their image; what leaves is forgotten but still computed."""
        if self._places is None:
            return super().select(rows, images)
        source = self._places[rows]
        if images is not None:
            self._places = self._places.view(-1, self._captions)[images].flatten()
        order = torch.arange(self._rows, device=rows.device)
        order[self._places] = source
        for keys_values in self._storage:
            keys_values.copy_(keys_values[:, order])

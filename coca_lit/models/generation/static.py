"""Captions with shapes that never change, for `torch.compile` and CUDA graphs: the step of a GPU.

The tests compile it on a CPU and compare its captions with those of `CoCa.generate`; it has not been run on a GPU.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from coca_lit.models.generation.generate import Captions, write
from coca_lit.models.generation.options import GenerateOptions
from coca_lit.models.generation.state import Decoding
from coca_lit.models.inputs import Images
from coca_lit.models.layers import KeysValues
from coca_lit.models.packing import StaticKVCache
from coca_lit.models.text import Decoder, Tower

if TYPE_CHECKING:
    from coca_lit.models.coca import CoCa

Step = Callable[..., Tensor]  # with the signature of `static_step`
Buffers = dict[Any, list[Tensor]]


class CompiledGenerator:
    """Writes captions as `CoCa.generate` does, with static shapes and a step that is compiled once for each number of
    captions in a batch and each `max_length`: worth it for many batches of one size.

    Args:
        options: of `torch.compile`.
    """

    def __init__(self, model: "CoCa", **options: Any) -> None:
        self.model = model
        self.step: Step = torch.compile(static_step, fullgraph=True, **options)
        self._buffers: Buffers = {}

    def generate(
        self,
        images: Images,
        *,
        return_scores: bool = False,
        return_attention: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Tensor | Captions:
        decoding = partial(StaticDecoding, step=self.step, buffers=self._buffers)
        return write(self.model, images, decoding, return_scores, return_attention, options)


def static_step(
    text: Tower,
    decoder: Decoder,
    tokens: Tensor,
    position: Tensor,
    image_keys_values: list[KeysValues],
    storage: list[Tensor],
) -> Tensor:
    """Logits (R, V), in float32, of what follows the tokens (R, 1) at the position (1,).

    Args:
        storage: keys and values (2, R, H, L, D/H) of the self-attention layers, text tower first; the step writes those
            of the tokens in place. A mask hides the positions to come.
    """
    mask = (torch.arange(storage[0].shape[3], device=position.device) <= position)[None, None, None]  # (1, 1, 1, L)
    caches = [StaticKVCache(keys_values, position) for keys_values in storage]
    states = text.step(tokens, caches[: text.cached_layers], mask)
    hidden = decoder.step(states, image_keys_values, caches[text.cached_layers :], mask)
    return decoder.vocabulary(hidden[:, -1]).float()


class StaticDecoding(Decoding):
    """A `Decoding` whose arrays keep their shapes, so one compiled graph serves every step and every batch of a size.

    The caches hold `max_length` positions from the start, and stay where they are in memory from batch to batch, as
    CUDA graphs need it. The prompts are still read with their own shape. Nothing in the step waits for the device.
    Captions that end stay in the batch until all have ended; strategies do not notice, because their rows are mapped to
    fixed slots.
    """

    def __init__(self, model: "CoCa", image_tokens: Tensor, max_length: int, step: Step, buffers: Buffers) -> None:
        super().__init__(model, image_tokens, max_length)
        self._step, self._buffers = step, buffers
        self._slots: Tensor | None = None  # of the rows that are still written (r,)

    def begin(self, tokens: Tensor, captions: int) -> Tensor:
        logits = super().begin(tokens, captions)
        caches = [cache.storage() for cache in (*self._text_caches, *self._decoder_caches)]
        self._storage = self._in_place("captions", caches)
        of_images = self._in_place("images", [x for pair in self._image_keys_values for x in pair])
        self._image_keys_values = list(zip(of_images[::2], of_images[1::2], strict=True))
        self._position = torch.full((1,), tokens.shape[1], device=tokens.device)
        self._captions = captions
        self._rows = len(tokens) * captions
        self._slots = torch.arange(self._rows, device=tokens.device)
        return logits

    def _in_place(self, what: str, tensors: list[Tensor]) -> list[Tensor]:
        """The same numbers in buffers that all batches of these shapes share."""
        key = (what, tensors[0].dtype, tensors[0].device, *(x.shape for x in tensors))
        if key not in self._buffers:
            self._buffers[key] = [torch.empty_like(x) for x in tensors]
            for buffer in self._buffers[key]:
                torch._dynamo.mark_static_address(buffer)
        torch._foreach_copy_(self._buffers[key], tensors)
        return self._buffers[key]

    def step(self, tokens: Tensor) -> Tensor:
        if self._slots is None:
            return super().step(tokens)
        spread = tokens.new_zeros(self._rows, 1)
        spread[self._slots] = tokens
        logits = self._step(self._text, self._decoder, spread, self._position, self._image_keys_values, self._storage)
        self._position += 1
        return logits[self._slots]

    def select(self, rows: Tensor, images: Tensor | None = None) -> None:
        """Moves rows among the slots of their image; a row that leaves is forgotten but still computed."""
        if self._slots is None:
            return super().select(rows, images)
        source = self._slots[rows]
        if images is not None:
            self._slots = self._slots.view(-1, self._captions)[images].flatten()
        order = torch.arange(self._rows, device=rows.device)
        order[self._slots] = source
        for keys_values in self._storage:
            keys_values.copy_(keys_values[:, order])

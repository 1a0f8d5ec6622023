"""The model while it writes: what it remembers of the images and of the captions so far.

An image's keys and values for the decoder's cross-attention are computed once, however many captions are written for
it: the captions of an image are the queries of one attention. Each step runs one new token per caption through the text
tower and the decoder.

`StaticDecoding` does this with shapes that never change, for `torch.compile` and CUDA graphs: the step of a GPU. The
tests compile it on a CPU and compare its captions with `Decoding`'s; it has not been run on a GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from coca_lit.models.image import ImageEncoder, Pooling
from coca_lit.models.layers import KeysValues, KVCache, StaticKVCache
from coca_lit.models.packing import to_device
from coca_lit.models.text import Decoder, TextTower
from coca_lit.tokenizer import Tokenizer

UNFORCED = -1  # marks a token that is chosen freely
LOOK_EVERY = 8  # tokens; between two looks at a GPU, captions that have ended are computed with the others

DecodingStep = Callable[..., Tensor]  # with the signature of `static_step`


class Captioner(Protocol):
    """What generation needs of a model."""

    tokenizer: Tokenizer
    image_encoder: ImageEncoder
    pooling: Pooling
    image_projection: nn.Module
    text: TextTower
    decoder: Decoder | None
    logit_scale: nn.Parameter
    static_step: DecodingStep | None
    static_buffers: dict[Any, list[Tensor]]
    training: bool

    @property
    def device(self) -> torch.device: ...

    def encode_text(self, tokens: Tensor, lengths: Tensor | None = None, normalize: bool = True) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...


class Prompts(NamedTuple):
    """Start ids, perhaps with words after them. Long prompts are forced while other captions are already written."""

    ids: Tensor  # (B, L), UNFORCED where a prompt has ended
    lengths: Tensor  # (B,)
    shortest: int


class Hypotheses(NamedTuple):
    """What a strategy writes, N captions for each image."""

    ids: Tensor  # (B, N, L), padded
    scores: Tensor  # (B, N), what the strategy orders them by
    log_probs: Tensor  # (B, N), of the chosen tokens, summed, before any constraint


class Decoding:
    """Captions in the making: one row per caption, the same number of rows for each image, side by side."""

    def __init__(self, model: Captioner, image_tokens: Tensor, max_length: int) -> None:
        """image_tokens (B, S, E) -> a state with one caption for each image."""
        assert model.decoder is not None
        self._text, self._decoder = model.text, model.decoder
        self._image_keys_values = self._decoder.keys_values(image_tokens)
        self._text_caches = [KVCache(max_length) for _ in range(self._text.cached_layers)]
        self._decoder_caches = [KVCache(max_length) for _ in range(self._decoder.cached_layers)]

    def begin(self, tokens: Tensor, captions: int) -> Tensor:
        """Reads prompts (B, t), makes `captions` rows for each image and returns their logits (B · captions, V)."""
        logits = self.step(tokens)
        if captions == 1:
            return logits
        rows = torch.arange(len(tokens), device=tokens.device).repeat_interleave(captions)
        self.select(rows)
        return logits[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Appends tokens (R, t) and returns logits (R, V), in float32, of the token after the last of them."""
        states = self._text.step(tokens, self._text_caches)
        hidden = self._decoder.step(states, self._image_keys_values, self._decoder_caches)
        return self._decoder.vocabulary(hidden[:, -1]).float()

    def select(self, rows: Tensor, images: Tensor | None = None) -> None:
        """Keeps the given rows, in that order, and the given images; None keeps all images."""
        for cache in (*self._text_caches, *self._decoder_caches):
            cache.select(rows)
        if images is not None:
            self._image_keys_values = [(k[images], v[images]) for k, v in self._image_keys_values]


def static_step(
    text: TextTower,
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

    def __init__(
        self, model: Captioner, image_tokens: Tensor, max_length: int, step: DecodingStep = static_step
    ) -> None:
        super().__init__(model, image_tokens, max_length)
        self._step, self._buffers = step, model.static_buffers
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


def look(mask: Tensor, position: int) -> Tensor | None:
    """A mask on the host, or None where it stays on the device: a GPU has to finish all its work for a look."""
    return None if mask.is_cuda and position % LOOK_EVERY else mask.cpu()


def encode_prompts(model: Captioner, prompt: str | Sequence[str] | None, count: int, max_length: int) -> Prompts:
    """The beginnings of `count` captions.

    Raises:
        ValueError: a prompt that is no text, is empty or leaves no room for a caption, or another number of prompts
            than of images.
    """
    rows = [[model.tokenizer.sot_id]] * count
    if prompt is not None:
        prompts = [prompt] * count if isinstance(prompt, str) else prompt
        if not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"prompt must be a text, or a list with one for each image, got {prompt!r}")
        if len(prompts) != count:
            raise ValueError(f"got {len(prompts)} prompts for {count} images: give one for all, or one for each image")
        rows = [ids[:-1] for ids in model.tokenizer.encode_batch(prompts)]
        if empty := [i for i, ids in enumerate(rows) if len(ids) == 1]:
            raise ValueError(f"prompt {empty[0]} has no words: give words, or no prompt at all (None)")
    longest = max(map(len, rows), default=1)
    if longest > max(max_length - 2, 1):  # the end and, after words, one more token
        raise ValueError(
            f"the prompt takes {longest} of {max_length} tokens and leaves no room for a caption; shorten it"
        )
    ids = torch.full((count, max_length), UNFORCED)
    for row, start in zip(ids, rows, strict=True):
        row[: len(start)] = torch.tensor(start)
    lengths = torch.tensor([len(start) for start in rows])
    return Prompts(to_device(ids, model.device), to_device(lengths, model.device), min(map(len, rows), default=1))

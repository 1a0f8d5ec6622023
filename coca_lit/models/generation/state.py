"""The model while it writes: what it remembers of the images and of the captions so far.

An image's keys and values for the decoder's cross-attention are computed once, however many captions are written for
it: the captions of an image are the queries of one attention. Each step runs one new token per caption through the text
tower and the decoder.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from coca_lit.models.layers import KVCache

if TYPE_CHECKING:
    from coca_lit.models.coca import CoCa

UNFORCED = -1  # stands for a token that is chosen, not given


class Prompts(NamedTuple):
    """Start ids, perhaps with a prompt after them. Long prompts are forced while other captions are already written."""

    ids: Tensor  # (B, L), FREE where a prompt has ended
    lengths: Tensor  # (B,)
    shortest: int


class Hypotheses(NamedTuple):
    """What a strategy writes, N captions for each image."""

    ids: Tensor  # (B, N, L), padded
    scores: Tensor  # (B, N), what the strategy prefers them by
    log_probs: Tensor  # (B, N), of the chosen tokens, summed, as the model has them before any constraint


class Decoding:
    """Captions in the making: one row per caption, as many rows for each image, rows of an image side by side."""

    def __init__(self, model: "CoCa", image_tokens: Tensor, max_length: int) -> None:
        """image_tokens (B, S, E) -> a state with one caption for each image."""
        assert model.decoder is not None
        self._text, self._decoder = model.text, model.decoder
        self._image_keys_values = self._decoder.keys_values(image_tokens)
        self._text_caches = [KVCache(max_length) for _ in self._text.blocks]
        self._decoder_caches = [KVCache(max_length) for _ in self._decoder.self_blocks]

    def begin(self, tokens: Tensor, captions: int) -> Tensor:
        """Reads beginnings (B, t), makes `captions` rows of each image and returns their logits (B · captions, V)."""
        logits = self.step(tokens)
        if captions == 1:
            return logits
        rows = torch.arange(len(tokens), device=tokens.device).repeat_interleave(captions)
        self.select(rows)
        return logits[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Adds the tokens (R, t) and returns logits (R, V), in float32, of what follows the last of them."""
        states = self._text.step(tokens, self._text_caches)
        hidden = self._decoder.step(states, self._image_keys_values, self._decoder_caches)
        return self._decoder.vocabulary(hidden[:, -1]).float()

    def select(self, rows: Tensor, images: Tensor | None = None) -> None:
        """Keeps the given rows, in that order, and the given images if some are to leave."""
        for cache in (*self._text_caches, *self._decoder_caches):
            cache.select(rows)
        if images is not None:
            self._image_keys_values = [(k[images], v[images]) for k, v in self._image_keys_values]


def encode_prompts(model: "CoCa", prompt: str | Sequence[str] | None, count: int, max_length: int) -> Prompts:
    """Beginnings of `count` captions.

    Raises:
        ValueError: an empty prompt, another number of prompts than of images, or one that leaves no room for a caption.
    """
    rows = [[model.tokenizer.sot_id]] * count if prompt is None else _encode(model, prompt, count)
    longest = max(map(len, rows), default=1)
    if longest > max(max_length - 2, 1):  # the end and, after words, one more token
        raise ValueError(
            f"the prompt takes {longest} of {max_length} tokens and leaves no room for a caption; shorten it"
        )
    ids = torch.full((count, max_length), UNFORCED)
    for row, beginning in zip(ids, rows, strict=True):
        row[: len(beginning)] = torch.tensor(beginning)
    lengths = torch.tensor([len(beginning) for beginning in rows])
    return Prompts(ids.to(model.device), lengths.to(model.device), min(map(len, rows), default=1))


def _encode(model: "CoCa", prompt: str | Sequence[str], count: int) -> list[list[int]]:
    prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
    if len(prompts) != count:
        raise ValueError(f"got {len(prompts)} prompts for {count} images: give one for all, or one for each image")
    rows = [ids[:-1] for ids in model.tokenizer.encode_batch(prompts)]
    if empty := [i for i, ids in enumerate(rows) if len(ids) == 1]:
        raise ValueError(f"prompt {empty[0]} has no words: give words, or no prompt at all (None)")
    return rows

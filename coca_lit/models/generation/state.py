"""The model while it writes: what it remembers of the images and of the captions so far.

An image's keys and values for the decoder's cross-attention are computed once, however many captions are written for
it: the captions of an image are the queries of one attention. Each step runs one new token per caption through the text
tower and the decoder.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from coca_lit.models.generation.options import complete
from coca_lit.models.packing import KVCache, to_device
from coca_lit.models.text import expect_decoder
from coca_lit.tokenizer import WordTokenizer

if TYPE_CHECKING:
    from coca_lit.models import DualEncoder
    from coca_lit.models.coca import CoCa

UNFORCED = -1  # marks a token that is chosen freely
LOOK_EVERY = 8  # tokens; between two looks at a GPU, captions that have ended are computed with the others


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

    def __init__(self, model: "CoCa", image_tokens: Tensor, max_length: int) -> None:
        """image_tokens (B, S, E) -> a state with one caption for each image."""
        self._text = model.text
        self._decoder = expect_decoder(model.decoder)
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


def look(mask: Tensor, position: int) -> Tensor | None:
    """A mask on the host, or None where it stays on the device: a GPU has to finish all its work for a look."""
    return None if not mask.is_cpu and position % LOOK_EVERY else mask.cpu()


def check_options(model: "DualEncoder", options: Mapping[str, Any]) -> None:
    """Raises `TypeError` or `ValueError` for options with which the model writes no caption: unknown or wrong ones, and
    a prompt that leaves no room.
    """
    found = complete(options)
    encode_prompts(model, found.prompt, 1, found.lengths(model.tokenizer.context_length)[1])


def encode_prompts(model: "DualEncoder", prompt: str | Sequence[str] | None, count: int, max_length: int) -> Prompts:
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
        if isinstance(model.tokenizer, WordTokenizer):
            model.tokenizer.warn_of_unknown(prompts)
        rows = [ids[:-1] for ids in model.tokenizer.encode_batch(prompts)]
        empty = [i for i, ids in enumerate(rows) if len(ids) == 1]
        if empty:
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

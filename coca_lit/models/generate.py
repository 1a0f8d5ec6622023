"""Writing captions: greedy decoding with cached keys and values.

An image is encoded once; its keys and values for the decoder's cross-attention are computed once; each step runs one
new token per caption through the text tower and the decoder. Captions that have ended leave the batch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coca_lit.models.layers import KVCache

if TYPE_CHECKING:
    from coca_lit.models.coca import CoCa

DEFAULT_MAX_LENGTH = 30  # start and end included, as in OpenCLIP


class Decoding:
    """Captions in the making: what the model has to remember of the images and of the tokens so far, one row per
    caption.
    """

    def __init__(self, model: "CoCa", images: Tensor, max_length: int) -> None:
        if model.decoder is None:
            raise ValueError(
                "this model has no decoder: it was built for retrieval only (decoder_layers=0) and cannot caption"
            )
        self._text, self._decoder = model.text, model.decoder
        _, image_tokens = model.pooling(model.image_encoder(images), contrastive=False)
        self._image_keys_values = self._decoder.keys_values(image_tokens)
        self._text_caches = [KVCache(max_length) for _ in self._text.blocks]
        self._decoder_caches = [KVCache(max_length) for _ in self._decoder.self_blocks]

    def step(self, tokens: Tensor) -> Tensor:
        """Adds the tokens (R, t) and returns logits (R, V) of what follows the last of them."""
        states = self._text.step(tokens, self._text_caches)
        hidden = self._decoder.step(states, self._image_keys_values, self._decoder_caches)
        return self._decoder.vocabulary(hidden[:, -1])

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows, in that order."""
        for cache in (*self._text_caches, *self._decoder_caches):
            cache.select(rows)
        self._image_keys_values = [(k[rows], v[rows]) for k, v in self._image_keys_values]


@torch.no_grad()
def generate(
    model: "CoCa", images: Tensor, *, prompt: str | Sequence[str] | None = None, max_length: int | None = None
) -> Tensor:
    """Greedy captions (B, L) of images (B, 3, H, W); see `CoCa.generate`."""
    was_training = model.training
    model.eval()
    try:
        return _greedy(model, images.to(model.device), prompt, max_length)
    finally:
        model.train(was_training)


def _greedy(model: "CoCa", images: Tensor, prompt: str | Sequence[str] | None, max_length: int | None) -> Tensor:
    tokenizer = model.tokenizer
    max_length = check_max_length(max_length, tokenizer.context_length)
    beginnings = encode_prompts(model, prompt, len(images), max_length)
    captions = torch.full((len(images), max_length), tokenizer.pad_id, device=images.device)  # (B, L)
    forced = torch.full_like(captions, -1)  # the prompts: tokens that are given instead of chosen
    for row, ids in enumerate(beginnings):
        forced[row, : len(ids)] = torch.tensor(ids, device=images.device)
    prefix = min(map(len, beginnings), default=0)
    captions[:, :prefix] = forced[:, :prefix]

    decoding = Decoding(model, images, max_length)
    active = torch.arange(len(images), device=images.device)  # rows of `captions` that have not ended
    new = captions[:, :prefix]
    for position in range(prefix, max_length):
        if len(active) == 0:
            break
        chosen = decoding.step(new).argmax(dim=-1)  # (R,)
        if position == max_length - 1:
            chosen = torch.full_like(chosen, tokenizer.eot_id)  # a caption that fills its room still ends properly
        given = forced[active, position]
        chosen = torch.where(given >= 0, given, chosen)
        captions[active, position] = chosen
        going_on = chosen != tokenizer.eot_id
        if not going_on.all():
            decoding.select(going_on.nonzero()[:, 0])
            active, chosen = active[going_on], chosen[going_on]
        new = chosen[:, None]
    return captions


def check_max_length(max_length: int | None, context_length: int) -> int:
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, context_length)
    if not 2 <= max_length <= context_length:
        raise ValueError(
            f"max_length must lie between 2 (start and end) and {context_length}, the context length, got {max_length}"
        )
    return max_length


def encode_prompts(model: "CoCa", prompt: str | Sequence[str] | None, count: int, max_length: int) -> list[list[int]]:
    """Ids that each of `count` captions begins with: the start id and the prompt, without an end."""
    prompts = [prompt or ""] * count if prompt is None or isinstance(prompt, str) else list(prompt)
    if len(prompts) != count:
        raise ValueError(
            f"got {len(prompts)} prompts for {count} images: give one prompt for all, or one for each image"
        )
    rows = [ids[:-1] for ids in model.tokenizer.encode_batch(prompts)]
    if count and (longest := max(map(len, rows))) > max(max_length - 2, 1):  # the end and, after words, one more token
        raise ValueError(
            f"the prompt takes {longest} of {max_length} tokens and leaves no room for a caption: "
            "raise max_length or shorten it"
        )
    return rows

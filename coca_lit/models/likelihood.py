"""log p(text | image): of pairs, and of many texts beside many images.

A forward pass of pairs runs the text tower for every pair, and projects the image tokens to keys and values for every
text. With `ReadTexts` each text passes the tower once, and each image is projected once.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from coca_lit.models.inputs import Images
from coca_lit.models.layers import KeysValues
from coca_lit.models.packing import KVCache, text_lengths, to_device
from coca_lit.models.text import expect_decoder

if TYPE_CHECKING:
    from coca_lit.models.coca import CoCa, CoCaOutput


def log_likelihood(model: "CoCa", images: Images, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
    """log p(text | image) (T,) of texts (T, L), in nats: the sum over their tokens after the start, without words that
    the vocabulary lacks.

    Args:
        images: (B, 3, H, W) or tokens of the image encoder (B, S, C); T / B texts side by side for each.
    """
    expect_decoder(model.decoder)
    lengths = model.lengths_of(tokens, lengths)
    texts = len(tokens) // max(len(images), 1)
    if texts * len(images) != len(tokens):
        raise ValueError(f"every image needs as many texts: got {len(images)} images and {len(tokens)} texts")
    image_tokens = model.encode_image_tokens(images).repeat_interleave(texts, dim=0)
    return log_likelihoods(model.captions_of(image_tokens, tokens, lengths), lengths)[0]


def log_likelihoods(out: "CoCaOutput", lengths: Tensor) -> tuple[Tensor, Tensor]:
    """As `log_likelihood`, from the output of the model, and the number of tokens that count (T,).

    Args:
        lengths: (T,) number of tokens of each text, on the host.
    """
    logits = out.logits.float()
    labels = out.labels
    assert labels is not None  # there are logits
    losses = F.cross_entropy(logits, labels, reduction="none")  # (N,), 0 for words that the vocabulary lacks
    text = to_device(torch.arange(len(lengths)).repeat_interleave(lengths - 1), losses.device)  # (N,)
    totals = losses.new_zeros(len(lengths)).index_add(0, text, -losses)
    return totals, torch.zeros_like(totals).index_add(0, text, (labels >= 0).float())


class ReadTexts:
    """T texts after their text tower.

    Args:
        tokens: (T, L) ids, padded at the end.
        batch_size: texts in the tower at a time.

    Attributes:
        lengths: (T,) on the host.
    """

    def __init__(self, model: "CoCa", tokens: Tensor, batch_size: int = 64) -> None:
        self.lengths = text_lengths(tokens, model.tokenizer.pad_id).cpu()
        self._model = model
        self._tokens = tokens
        self._states: dict[int, Tensor] = {}  # (length - 1, D) of each: the last token predicts nothing
        for numbers in self.lengths.argsort(stable=True).split(batch_size):
            longest = int(self.lengths[numbers].max())
            caches = [KVCache(longest) for _ in range(model.text.cached_layers)]
            states = model.text.step(tokens[numbers, :longest], caches)
            for number, rows in zip(numbers.tolist(), states, strict=True):
                self._states[number] = rows[: int(self.lengths[number]) - 1].clone()

    def log_likelihoods(self, images: list[KeysValues], numbers: Tensor) -> Tensor:
        """log p(text | image) (B, K), in nats, of the texts with these numbers (B, K) beside each of B images: the sum
        over their tokens after the start, without words that the vocabulary lacks.

        Args:
            images: of `image_keys_values`.
        """
        decoder = expect_decoder(self._model.decoder)
        flat = numbers.flatten()
        states = pad_sequence([self._states[number] for number in flat.tolist()], batch_first=True)  # (B · K, t, D)
        hidden = decoder.step(states, images, [KVCache(states.shape[1]) for _ in range(decoder.cached_layers)])
        labels = self._tokens[flat, 1 : states.shape[1] + 1]  # (B · K, t)
        counted = (torch.arange(states.shape[1]) < self.lengths[flat, None] - 1).to(labels.device)
        unknown = self._model.tokenizer.unk_id
        if unknown is not None:
            counted &= labels != unknown
        losses = F.cross_entropy(decoder.vocabulary(hidden[counted]).float(), labels[counted], reduction="none")
        totals = torch.zeros(counted.shape, device=losses.device).masked_scatter(counted, -losses).sum(dim=1)
        return totals.view(numbers.shape)


def image_keys_values(model: "CoCa", images: Images) -> list[KeysValues]:
    """What the decoder needs of images, or of tokens of the image encoder: keys and values of each layer."""
    return expect_decoder(model.decoder).keys_values(model.encode_image_tokens(images))

"""log p(text | image) of many texts beside many images.

A forward pass of pairs runs the text tower for every pair, and projects the image tokens to keys and values for every
text. Here each text passes the tower once, and each image is projected once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from coca_lit.models.coca import CoCa
from coca_lit.models.layers import KeysValues, KVCache
from coca_lit.models.packing import text_lengths
from coca_lit.models.patches import Images
from coca_lit.models.text import expect_decoder


class ReadTexts:
    """T texts after their text tower.

    Args:
        tokens: (T, L) ids, padded at the end.
        batch_size: texts in the tower at a time.

    Attributes:
        lengths: (T,) on the host.
    """

    def __init__(self, model: CoCa, tokens: Tensor, batch_size: int = 64) -> None:
        self.lengths = text_lengths(tokens, model.tokenizer.pad_id).cpu()
        self._model, self._tokens = model, tokens
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
        decoder, flat = expect_decoder(self._model.decoder), numbers.flatten()
        states = pad_sequence([self._states[number] for number in flat.tolist()], batch_first=True)  # (B · K, t, D)
        hidden = decoder.step(states, images, [KVCache(states.shape[1]) for _ in range(decoder.cached_layers)])
        labels = self._tokens[flat, 1 : states.shape[1] + 1]  # (B · K, t)
        counted = (torch.arange(states.shape[1]) < self.lengths[flat, None] - 1).to(labels.device)
        if (unknown := self._model.tokenizer.unk_id) is not None:
            counted &= labels != unknown
        losses = F.cross_entropy(decoder.vocabulary(hidden[counted]).float(), labels[counted], reduction="none")
        totals = torch.zeros(counted.shape, device=losses.device).masked_scatter(counted, -losses).sum(dim=1)
        return totals.view(numbers.shape)


def image_keys_values(model: CoCa, images: Images) -> list[KeysValues]:
    """What the decoder needs of images, or of tokens of the image encoder: keys and values of each layer."""
    decoder = expect_decoder(model.decoder)
    _, tokens = model.pooling(model.image_encoder(images), contrastive=False)
    return decoder.keys_values(tokens)

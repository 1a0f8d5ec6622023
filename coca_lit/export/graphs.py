"""The parts of a CoCa as modules of tensors alone, which is what a graph can hold: image encoder, text encoder, and a
decoder whose cache goes in and comes out.

Beside the letters of the model files: L layers of the decoder, N layers with a cache (text tower and decoder), P
positions in the cache, t new positions, C the context length.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.models import CoCa, text_lengths
from coca_lit.models.layers import CrossBlock, KVCache


class ImageGraph(nn.Module):
    def __init__(self, model: CoCa) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images (B, 3, H, W) uint8 -> features (B, E) of unit length and, if the model captions, the keys and the
        values of the image for every layer of the decoder, each (L, B, H, S, D/H).
        """
        decoder = self.model.decoder
        vector, tokens = self.model.pooling(self.model.image_encoder(images), captioning=decoder is not None)
        features = F.normalize(self.model.image_projection(vector), dim=-1)
        if decoder is None:
            return (features,)
        keys, values = zip(*decoder.keys_values(tokens), strict=True)
        return features, torch.stack(keys), torch.stack(values)


class TextGraph(nn.Module):
    def __init__(self, model: CoCa) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, C), padded to the context length -> features (B, E) of unit length."""
        lengths = text_lengths(tokens, self.model.tokenizer.pad_id)
        _, features = self.model.text.encode(tokens, lengths)
        return F.normalize(features, dim=-1)


class DecoderGraph(nn.Module):
    """One graph reads the beginning of a caption (P = 0) and writes on (t = 1)."""

    def __init__(self, model: CoCa) -> None:
        super().__init__()
        assert model.decoder is not None
        self.text, self.decoder = model.text, model.decoder

    def forward(
        self, tokens: Tensor, image_keys: Tensor, image_values: Tensor, past_keys: Tensor, past_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (B, t), those of `ImageGraph`, and the cache, keys and values (N, B, H, P, D/H)
        -> logits (B, V) of the token after the last one, and the cache (N, B, H, P + t, D/H).
        """
        past, new = past_keys.shape[3], tokens.shape[1]
        positions = torch.arange(new) + past  # (t,)
        mask = (torch.arange(past + new) <= positions[:, None])[None, None]  # (1, 1, t, P + t)
        caches = [_Cache(keys, values) for keys, values in zip(past_keys, past_values, strict=True)]
        text_blocks = len(self.text.blocks)
        x = self.text.token_embedding(tokens) + self.text.position_embedding[positions]  # (B, t, D)
        for block, cache in zip(self.text.blocks, caches[:text_blocks], strict=True):
            x = block(x, mask, cache)
        layers = zip(self.decoder.self_blocks, self.decoder.cross_blocks, strict=True)
        for i, (self_block, cross_block) in enumerate(layers):
            x = self_block(x, mask, caches[text_blocks + i])
            x = cast(CrossBlock, cross_block)(x, (image_keys[i], image_values[i]))
        logits = self.decoder.vocabulary(self.decoder.norm(x[:, -1]))
        return logits, torch.stack([cache.keys for cache in caches]), torch.stack([cache.values for cache in caches])


class _Cache(KVCache):
    """Grows by concatenation, because a graph does not write into what it is given."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        return self.keys, self.values

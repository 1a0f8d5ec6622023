"""The parts of a CoCa as modules whose inputs and outputs are tensors only: image encoder, text encoder, and a decoder
with its cache as input and output.

Letters beyond the model files': L layers of the decoder, N layers with a cache (text tower and decoder), P
positions in the cache, t new positions, C the context length.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.data.inputs import IMAGES, ImageReader
from coca_lit.models import CoCa, text_lengths
from coca_lit.models.packing import KVCache


class Graph(NamedTuple):
    """A module in evaluation mode, with example inputs and names for the exporter."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: Sequence[str]
    dynamic: dict[str, dict[int, str]]  # input -> axis of any length -> its name
    what: str  # for people


def graphs_of(model: CoCa, reader: ImageReader = IMAGES) -> dict[str, Graph]:
    """All graphs of a model on the CPU, by name, for images or another kind of input; a CLIP has no decoder."""
    size = model.image_size
    noise = torch.Generator().manual_seed(0)
    shape = (3, *reader.leading, 3, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise)
    tokens = model.tokenizer(["a photo of a dog", "two", "a red circle"])
    axes = f"({', '.join(map(str, ('B', *reader.leading, 3, 'H', 'W')))})"
    outputs = ["features"]
    what = f"images {axes} uint8 → `features` (B, E), of unit length"
    if model.decoder is not None:
        outputs += ["image_keys", "image_values"]
        what += ", and `image_keys`, `image_values` (L, B, H, S, D/H) for the decoder"
    read = "tokens (B, C), padded → `features` (B, E), of unit length"
    graphs = {
        "image_encoder": Graph(
            ImageGraph(model, reader).eval(), {"images": images}, outputs, {"images": {0: "batch"}}, what
        ),
        "text_encoder": Graph(
            TextGraph(model).eval(), {"tokens": tokens}, ["features"], {"tokens": {0: "batch"}}, read
        ),
    }
    return graphs | ({"decoder": _decoder_graph(model, reader, images, tokens)} if model.decoder is not None else {})


@torch.no_grad()
def _decoder_graph(model: CoCa, reader: ImageReader, images: Tensor, tokens: Tensor) -> Graph:
    """The example adds two tokens to a cache of five; the cache is noise."""
    module = DecoderGraph(model).eval()
    _, image_keys, image_values = ImageGraph(model, reader)(images)
    _, batch, heads, _, width = image_keys.shape
    noise = torch.Generator().manual_seed(0)
    past = torch.randn(2, module.layers, batch, heads, 5, width, generator=noise)
    inputs = {"tokens": tokens[:, :2], "image_keys": image_keys, "image_values": image_values}
    image_axes = {1: "batch"}
    past_axes = {1: "batch", 3: "past"}
    dynamic = {"tokens": {0: "batch", 1: "new"}, "image_keys": image_axes, "image_values": image_axes}
    what = (
        "tokens (B, t), image keys and values, `past_keys`, `past_values` (N, B, H, P, D/H) → `logits` (B, V) of what"
        " follows, and `keys`, `values` with t more positions; a caption begins with P = 0"
    )
    return Graph(
        module,
        {**inputs, "past_keys": past[0], "past_values": past[1]},
        ["logits", "keys", "values"],
        {**dynamic, "past_keys": past_axes, "past_values": past_axes},
        what,
    )


class ImageGraph(nn.Module):
    def __init__(self, model: CoCa, reader: ImageReader) -> None:
        super().__init__()
        self.model = model
        self.reader = reader

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images (B, *leading, 3, H, W) uint8, see `ImageReader`, -> features (B, E) of unit length and, if the model
        captions, the keys and the values of the image for every layer of the decoder, each (L, B, H, S, D/H).
        """
        decoder = self.model.decoder
        encoded = self.model.image_encoder(self.reader.batch(images))
        vector, tokens = self.model.pooling(encoded, captioning=decoder is not None)
        features = F.normalize(self.model.image_projection(cast(Tensor, vector)), dim=-1)
        if decoder is None:
            return (features,)
        keys, values = zip(*decoder.keys_values_of_graph(cast(Tensor, tokens)), strict=True)
        return features, torch.stack(keys), torch.stack(values)


class TextGraph(nn.Module):
    def __init__(self, model: CoCa) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, C), padded to the context length -> features (B, E) of unit length."""
        lengths = text_lengths(tokens, self.model.tokenizer.pad_id)
        rows = self.model.text.most_rows
        _, features, _ = self.model.text(tokens, lengths, packed=False, max_length=rows)
        return F.normalize(cast(Tensor, features), dim=-1)


class DecoderGraph(nn.Module):
    """One graph reads the beginning of a caption (P = 0) and continues it (t = 1)."""

    def __init__(self, model: CoCa) -> None:
        super().__init__()
        assert model.decoder is not None
        self.text = model.text
        self.decoder = model.decoder
        self.layers = model.text.cached_layers + model.decoder.cached_layers

    def forward(
        self, tokens: Tensor, image_keys: Tensor, image_values: Tensor, past_keys: Tensor, past_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (B, t), the outputs of `ImageGraph`, and the cache, keys and values (N, B, H, P, D/H)
        -> logits (B, V) of the token after the last one, and the cache (N, B, H, P + t, D/H).
        """
        past = past_keys.shape[3]
        new = tokens.shape[1]
        positions = torch.arange(new) + past  # (t,)
        mask = (torch.arange(past + new) <= positions[:, None])[None, None]  # (1, 1, t, P + t)
        caches = [_Cache(keys, values, past) for keys, values in zip(past_keys, past_values, strict=True)]
        image = list(zip(image_keys, image_values, strict=True))
        x = self.text.step(tokens, caches[: self.text.cached_layers], mask)  # (B, t, D)
        x = self.decoder.step(x, image, caches[self.text.cached_layers :], mask)
        logits = self.decoder.vocabulary(x[:, -1])
        return logits, torch.stack([cache.keys for cache in caches]), torch.stack([cache.values for cache in caches])


class _Cache(KVCache):
    """Grows by concatenation, because a graph does not write into its inputs."""

    def __init__(self, keys: Tensor, values: Tensor, used: int) -> None:
        self.keys = keys
        self.values = values
        self.used = used

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)
        return self.keys, self.values

"""CoCa (Contrastive Captioners, arXiv 2205.01917) for Transformers, in plain PyTorch.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    pixels = processor(image, return_tensors="pt")                      # {"pixel_values": (B, 3, H, W)}
    tokenizer.batch_decode(model.generate(**pixels), skip_special_tokens=True)
    model(**pixels, **tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits_per_image

To Transformers it is an encoder-decoder: the encoder turns pixels into image tokens, the decoder writes a text.

Shape letters: B batch, T text positions, S positions that attention looks at, Q image tokens, D width, H heads, E width
of the common space, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import ModelOutput


class CoCaConfig(PretrainedConfig):
    """Sizes of the model; the defaults describe coca_ViT-B-32.

    Args:
        pooler: single, parallel or cascade, see `ImageTower`.
        cls_mask: correct or legacy, see `TextTower`.
        multimodal_layers: 0 for a model that only compares images with texts.
        has_logit_bias: whether the model was trained with SigLIP's loss.
        text_padding_id: what the text tower reads after the end of a text.
    """

    model_type = "coca_lit"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 32,
        image_width: int = 768,
        image_layers: int = 12,
        image_heads: int = 12,
        image_mlp_width: int = 3072,
        image_activation: str = "gelu",
        embed_dim: int = 512,
        pooler: str = "single",
        pooler_queries: int = 256,
        pooler_heads: int = 8,
        vocab_size: int = 49408,
        context_length: int = 76,
        cls_mask: str = "legacy",
        text_width: int = 512,
        text_layers: int = 12,
        text_heads: int = 8,
        text_mlp_width: int = 2048,
        text_activation: str = "gelu",
        multimodal_layers: int = 12,
        layer_norm_eps: float = 1e-5,
        has_logit_bias: bool = False,
        text_padding_id: int = 0,
        **kwargs: Any,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        # Transformers makes a key/value cache of as many layers as this says.
        kwargs.setdefault("num_hidden_layers", text_layers + multimodal_layers)
        kwargs.setdefault("is_encoder_decoder", True)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        for name, value in arguments.items():
            setattr(self, name, value)


@dataclass
class ImageOutput(ModelOutput):
    """What the image tower makes of a batch of images."""

    last_hidden_state: Tensor | None = None  # (B, Q, E), for the decoder
    image_embeds: Tensor | None = None  # (B, E), of unit length


@dataclass
class CoCaOutput(ModelOutput):
    """The parts that the inputs of `CoCaModel.forward` allow to compute."""

    logits: Tensor | None = None  # (B, T, V), of the token after each of `decoder_input_ids`
    image_embeds: Tensor | None = None  # (B, E), of unit length
    text_embeds: Tensor | None = None  # (B, E), of unit length
    logits_per_image: Tensor | None = None  # (images, texts)
    logits_per_text: Tensor | None = None  # (texts, images)
    encoder_last_hidden_state: Tensor | None = None  # (B, Q, E)


class CoCaModel(PreTrainedModel, GenerationMixin):
    config_class = CoCaConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["SelfBlock", "CrossBlock"]

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__(config)
        self.vision = ImageTower(config)
        self.text = TextTower(config)
        self.decoder = Decoder(config) if config.multimodal_layers else None
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1)) if config.has_logit_bias else None
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E), of unit length."""
        return self.vision(pixel_values).image_embeds

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, E), of unit length; without a mask a text ends with its first end token."""
        if attention_mask is None:
            lengths = (input_ids == self.config.eos_token_id).int().argmax(dim=1) + 1
        else:
            lengths = attention_mask.sum(dim=1)
        return self.text.features(input_ids, lengths)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: ImageOutput | None = None,
        cache: Any = None,
        return_dict: bool = True,
    ) -> CoCaOutput:
        """
        Args:
            pixel_values: (B, 3, H, W), from the image processor.
            input_ids, attention_mask: (B, T) texts to compare with the images.
            decoder_input_ids: (B, T) beginnings of captions; with a cache only the tokens that it lacks.
            encoder_outputs: of the image tower, in place of `pixel_values`.
            cache: an `EncoderDecoderCache`.
        """
        out = CoCaOutput()
        if encoder_outputs is None and pixel_values is not None:
            encoder_outputs = self.vision(pixel_values)
        if encoder_outputs is not None:
            out.image_embeds = encoder_outputs.image_embeds
            out.encoder_last_hidden_state = encoder_outputs.last_hidden_state
        if input_ids is not None:
            out.text_embeds = self.get_text_features(input_ids, attention_mask)
        if out.text_embeds is not None and out.image_embeds is not None:
            logits = self.logit_scale.exp() * out.image_embeds @ out.text_embeds.T
            out.logits_per_image = logits if self.logit_bias is None else logits + self.logit_bias
            out.logits_per_text = out.logits_per_image.T
        if decoder_input_ids is not None:
            if self.decoder is None:
                raise ValueError("this model has no decoder: it compares images with texts and writes no captions")
            if encoder_outputs is None:
                raise ValueError("a caption needs an image: give pixel_values, or encoder_outputs")
            past = cache.get_seq_length() if cache is not None else 0
            mask = causal_mask(past, decoder_input_ids)
            states = self.text.states(decoder_input_ids, past, mask, cache)
            first_layer = len(self.text.blocks)
            out.logits = self.decoder(states, encoder_outputs.last_hidden_state, mask, cache, first_layer)
        return out

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.vision

    def prepare_inputs_for_generation(
        self,
        decoder_input_ids: Tensor,
        encoder_outputs: ImageOutput | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next `forward`. Earlier versions of Transformers call the cache `past_key_values`."""
        cache = cache if cache is not None else past_key_values
        past = cache.get_seq_length() if cache is not None else 0
        return {"decoder_input_ids": decoder_input_ids[:, past:], "encoder_outputs": encoder_outputs, "cache": cache}


def causal_mask(past: int, tokens: Tensor) -> Tensor | None:
    """(T, past + T), True where a new position may look; None if there is one, which sees everything before it."""
    new = tokens.shape[1]
    if new == 1:
        return None
    positions = torch.arange(past + new, device=tokens.device)
    return positions <= positions[past:, None]


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, T, D) -> (B, H, T, D/H)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, H, T, D/H) -> (B, T, D)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Any, layer: int) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.self_attention_cache.update(k, v, layer)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


class CrossAttention(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = split_heads(self.q(x), self.heads)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, keys, values)))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, C) -> keys and values, each (B, H, S, D/H)."""
        keys, values = self.kv(context).chunk(2, dim=-1)
        return split_heads(keys, self.heads), split_heads(values, self.heads)


def mlp(width: int, hidden: int, activation: str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), ACTIVATIONS[activation](), nn.Linear(hidden, width))


class SelfBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, activation: str, eps: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width, heads)
        self.norm_2 = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp(width, hidden, activation)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None, layer: int = 0) -> Tensor:
        x = x + self.attention(self.norm_1(x), mask, cache, layer)
        return x + self.mlp(self.norm_2(x))


class CrossBlock(nn.Module):
    """A `SelfBlock` whose attention looks at the image tokens; with a cache their keys are computed once."""

    def __init__(self, width: int, context_width: int, heads: int, hidden: int, activation: str, eps: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=eps)
        self.norm_context = nn.LayerNorm(context_width, eps=eps)
        self.attention = CrossAttention(width, context_width, heads)
        self.norm_2 = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp(width, hidden, activation)

    def forward(self, x: Tensor, image: Tensor, cache: Any, layer: int) -> Tensor:
        x = x + self.attention(self.norm_1(x), *self.keys_values(image, cache, layer))
        return x + self.mlp(self.norm_2(x))

    def keys_values(self, image: Tensor, cache: Any, layer: int) -> tuple[Tensor, Tensor]:
        if cache is None:
            return self.attention.keys_values(self.norm_context(image))
        if not cache.is_updated.get(layer):
            cache.cross_attention_cache.update(*self.attention.keys_values(self.norm_context(image)), layer)
            cache.is_updated[layer] = True
        kept = cache.cross_attention_cache.layers[layer]
        return kept.keys, kept.values


class AttentionalPooler(nn.Module):
    """Learned queries that attend to a sequence and return one token each."""

    def __init__(self, context_width: int, width: int, queries: int, heads: int, eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.norm_query = nn.LayerNorm(width, eps=eps)
        self.norm_context = nn.LayerNorm(context_width, eps=eps)
        self.attention = CrossAttention(width, context_width, heads)
        self.norm_out = nn.LayerNorm(width, eps=eps)

    def forward(self, context: Tensor) -> Tensor:
        """(B, S, C) -> (B, Q, E)"""
        query = self.norm_query(self.query).expand(len(context), -1, -1)
        return self.norm_out(self.attention(query, *self.attention.keys_values(self.norm_context(context))))


class ImageTower(nn.Module):
    """CLIP's vision transformer and the poolers above it.

    single: query 0 of one pooler is the contrastive vector, the others are the tokens for the decoder. parallel: a
    second pooler of one query attends to the same sequence. cascade: that one attends to the output of the first.
    """

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        width, eps = config.image_width, config.layer_norm_eps
        self.patches = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        count = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nn.Parameter(torch.zeros(1, count + 1, width))
        self.norm = nn.LayerNorm(width, eps=eps)
        block = (width, config.image_heads, config.image_mlp_width, config.image_activation, eps)
        self.blocks = nn.ModuleList(SelfBlock(*block) for _ in range(config.image_layers))
        self.pooler, sizes = config.pooler, (config.pooler_heads, eps)
        self.generative = AttentionalPooler(width, config.embed_dim, config.pooler_queries, *sizes)
        if self.pooler != "single":
            context_width = width if self.pooler == "parallel" else config.embed_dim
            self.contrastive = AttentionalPooler(context_width, config.embed_dim, 1, *sizes)
        self.projection = nn.Linear(config.embed_dim, config.embed_dim, bias=False)

    def forward(self, pixel_values: Tensor, **options: Any) -> ImageOutput:
        """`options` are those that `generate` passes to every encoder."""
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)  # (B, patches, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.position_embedding
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        tokens = self.generative(x)  # (B, Q, E)
        if self.pooler == "single":
            vector, tokens = tokens[:, 0], tokens[:, 1:]
        else:
            vector = self.contrastive(x if self.pooler == "parallel" else tokens)[:, 0]
        return ImageOutput(last_hidden_state=tokens, image_embeds=F.normalize(self.projection(vector), dim=-1))


class TextTower(nn.Module):
    """A state for each token, and a CLS state that has seen the text.

    CLS stands after the text and always has the last position embedding. With the correct mask it sees the text and
    itself, with the legacy one of OpenCLIP the text and one token of padding, and itself only if the text fills the
    context.
    """

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        width, eps = config.text_width, config.layer_norm_eps
        self.context_length, self.padding_id = config.context_length, config.text_padding_id
        self.legacy = config.cls_mask == "legacy"
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.zeros(config.context_length + 1, width))
        self.cls_embedding = nn.Parameter(torch.zeros(width))
        block = (width, config.text_heads, config.text_mlp_width, config.text_activation, eps)
        self.blocks = nn.ModuleList(SelfBlock(*block) for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.projection = nn.Linear(width, config.embed_dim, bias=False)

    def states(self, tokens: Tensor, past: int, mask: Tensor | None, cache: Any) -> Tensor:
        """(B, T) -> (B, T, D) of tokens that follow `past` others."""
        x = self.token_embedding(tokens) + self.position_embedding[past : past + tokens.shape[1]]
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer)
        return x

    def features(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, T) and their number (B,) in each text -> (B, E), of unit length."""
        cls_at = (lengths + 1).clamp(max=self.context_length) if self.legacy else lengths  # (B,)
        rows = int(cls_at.max()) + 1
        tokens = F.pad(tokens, (0, max(rows - tokens.shape[1], 0)))[:, :rows]
        positions = torch.arange(rows, device=tokens.device).expand(len(tokens), -1)  # (B, rows)
        tokens = tokens.where(positions < lengths[:, None], self.padding_id)
        is_cls = positions == cls_at[:, None]
        x = torch.where(is_cls[..., None], self.cls_embedding, self.token_embedding(tokens))
        x = x + self.position_embedding[positions.where(~is_cls, self.context_length)]
        mask = torch.ones(rows, rows, dtype=torch.bool, device=tokens.device).tril()
        if self.legacy:
            blind = is_cls & (lengths < self.context_length)[:, None]
            mask = (mask & ~torch.diag_embed(blind))[:, None]  # (B, 1, rows, rows)
        for block in self.blocks:
            x = block(x, mask)
        cls = x[torch.arange(len(x), device=x.device), cls_at]  # (B, D)
        return F.normalize(self.projection(self.norm(cls)), dim=-1)


class Decoder(nn.Module):
    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        width, heads, eps = config.text_width, config.text_heads, config.layer_norm_eps
        rest = (heads, config.text_mlp_width, config.text_activation, eps)
        layers = range(config.multimodal_layers)
        self.self_blocks = nn.ModuleList(SelfBlock(width, *rest) for _ in layers)
        self.cross_blocks = nn.ModuleList(CrossBlock(width, config.embed_dim, *rest) for _ in layers)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.vocabulary = nn.Linear(width, config.vocab_size, bias=False)

    def forward(self, x: Tensor, image: Tensor, mask: Tensor | None, cache: Any, first_layer: int) -> Tensor:
        """States of the text tower (B, T, D) and image tokens (B, Q, E) -> logits (B, T, V).

        Args:
            first_layer: how many layers of the cache belong to the text tower.
        """
        for i, (self_block, cross_block) in enumerate(zip(self.self_blocks, self.cross_blocks, strict=True)):
            x = self_block(x, mask, cache, first_layer + i)
            x = cross_block(x, image, cache, i)
        return self.vocabulary(self.norm(x))


class CoCaImageProcessor(BaseImageProcessor):
    """Resizes, crops the centre and normalises, with Pillow and the rounding of torchvision, as in training: the pixels
    of Transformers' own CLIP processors differ.

    Args:
        crop_size: of the result.
        resample: of Pillow, 3 for bicubic and 2 for bilinear.
        resize_mode: shortest: the shorter side becomes the size, and the centre is kept. longest: the longer
            side does, and the rest is black. squash: both do.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        crop_size: dict[str, int] | None = None,
        resample: int = 3,
        resize_mode: str = "shortest",
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.crop_size = crop_size or {"height": 224, "width": 224}
        self.resample, self.resize_mode = resample, resize_mode
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """One image or a list, of Pillow, or arrays (H, W, 3) uint8 -> {"pixel_values": (B, 3, size, size)}."""
        images = images if isinstance(images, list | tuple) else [images]
        return BatchFeature({"pixel_values": [self.pixels(image) for image in images]}, tensor_type=return_tensors)

    def pixels(self, image: Any) -> np.ndarray:
        size = int(self.crop_size["height"])
        image = (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).convert("RGB")
        if self.resize_mode == "squash":
            width, height = size, size
        elif self.resize_mode == "longest":
            width, height = (max(round(side / (max(image.size) / size)), 1) for side in image.size)
        else:
            width, height = (int(size * side / min(image.size)) for side in image.size)
        left, top = (round((side - size) / 2) if side >= size else -((size - side) // 2) for side in (width, height))
        image = image.resize((width, height), Image.Resampling(self.resample))
        image = image.crop((left, top, left + size, top + size))  # what lies outside is black
        mean, std = (np.asarray(values, dtype=np.float32) for values in (self.image_mean, self.image_std))
        pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))

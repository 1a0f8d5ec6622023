"""CLIP as OpenAI and OpenCLIP build it (arXiv 2103.00020): the two encoders of their released files, for evaluation.

CoCa pools images with learned queries and texts with a CLS token. CLIP uses the vision transformer's class token and
the state of the end token, so its weights do not fit a CoCa, not even one without decoder.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from torch import Tensor, nn

from coca_lit.models.coca import CoCa
from coca_lit.models.config import Interpolation, ResizeMode
from coca_lit.models.image import ImageEncoder
from coca_lit.models.inputs import Images, Input, Preprocessing, preprocessing
from coca_lit.models.layers import SelfBlock
from coca_lit.models.packing import expect_to_fit, expect_tokens
from coca_lit.tokenizer import get_tokenizer


class CLIP(nn.Module):
    """A vision transformer and a causal text transformer with a common space of width `embed_dim`, and no captioner.

    Args:
        image_encoder_args: of timm's `vit_base_patch32_clip_224`: patch_size, embed_dim, depth, num_heads, mlp_ratio.
        image_size: side of the square input in pixels.
        quick_gelu: QuickGELU, x · sigmoid(1.702 x), with which OpenAI trained, instead of GELU, in both towers. Weights
            do not tell which one they were trained with.
        interpolation, resize_mode: how photos are brought to `image_size`, see `build_transform`.
    """

    decoder = None  # as in a CoCa without captioner

    def __init__(
        self,
        *,
        image_encoder_args: dict[str, Any],
        image_size: int,
        embed_dim: int,
        context_length: int,
        text_width: int,
        text_layers: int,
        text_heads: int,
        quick_gelu: bool = False,
        interpolation: Interpolation = "bicubic",
        resize_mode: ResizeMode = "shortest",
    ) -> None:
        super().__init__()
        self.preprocessing: Preprocessing = preprocessing(image_size, interpolation, resize_mode)
        self.tokenizer = get_tokenizer("clip", context_length)
        activation = QuickGELU if quick_gelu else nn.GELU
        arguments = {"final_norm": True, "act_layer": activation, **image_encoder_args}
        self.image_encoder = ImageEncoder("vit_base_patch32_clip_224", image_size, **arguments)
        self.image_projection = nn.Linear(self.image_encoder.width, embed_dim, bias=False)
        self.token_embedding = nn.Embedding(self.tokenizer.vocab_size, text_width)
        self.position_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.blocks = nn.ModuleList(
            SelfBlock(text_width, text_heads, activation=activation) for _ in range(text_layers)
        )
        self.norm = nn.LayerNorm(text_width)
        self.text_projection = nn.Linear(text_width, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))

    @property
    def image_size(self) -> int:
        return self.image_encoder.image_size

    def set_image_size(self, image_size: int) -> None:
        """From now on the model takes images of this size, see `ImageEncoder.set_image_size`."""
        self.image_encoder.set_image_size(image_size)
        self.preprocessing["size"] = image_size

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def encode_image(self, images: Images, normalize: bool = True) -> Tensor:
        """images (B, 3, H, W) -> features (B, E), of unit length unless `normalize` is off."""
        encoded = self.image_encoder(images)
        class_tokens = encoded.class_tokens() if isinstance(encoded, Input) else encoded[:, 0]
        features = self.image_projection(class_tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """tokens (B, L) -> text features (B, E), of unit length unless `normalize` is off."""
        expect_tokens(tokens)
        ends = tokens.argmax(dim=1)  # (B,), the end token has the largest id
        tokens = tokens[:, : int(ends.max()) + 1]  # attention is causal: nothing before the end sees what follows it
        expect_to_fit(tokens.shape[1], len(self.position_embedding))
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        last = x[torch.arange(len(x), device=x.device), ends]  # (B, D)
        features = self.text_projection(self.norm(last))
        return F.normalize(features, dim=-1) if normalize else features


DualEncoder = CoCa | CLIP  # what embeds images and texts in a common space

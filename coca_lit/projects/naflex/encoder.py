"""An image encoder that takes images of any shape: timm's NaFlexVit (Native Flexible Vision Transformer).

As in NaViT (arXiv 2307.06304) and FlexiViT an image keeps its aspect ratio and becomes as many patches as fit into a
budget. The positions, learned on a grid, are resized to the grid of each image.
"""

from typing import Any

from torch import Tensor

from coca_lit.models.image import CLIP_NORMALISATION, ImageEncoder, is_raw
from coca_lit.models.inputs import expect_batch, expect_pixels
from coca_lit.projects.naflex.inputs import AnyShape, EncodedPatches, Patches

TIMM_NAME = "naflexvit_base_patch16_gap"
DEFAULTS: dict[str, Any] = {
    "patch_size": 16,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "reg_tokens": 4,
}


class NaFlexEncoder(ImageEncoder):
    """Patches of images -> a token for each patch. Register tokens are dropped; padding changes no other token.

    Args:
        image_size: side in pixels of the square whose number of patches is the budget of an image.
        max_patches: another budget.
        arguments: of timm's NaFlexVit: patch_size, pos_embed_grid_size, pre_norm, embed_dim, depth, num_heads, ….
    """

    token_kind = EncodedPatches
    input_kind: AnyShape

    def __init__(self, image_size: int, max_patches: int | None = None, **arguments: Any) -> None:
        if arguments.get("patch_drop_rate"):
            raise ValueError("patch_drop_rate does not work with images of different numbers of patches: leave it out")
        given = {"pretrained_cfg_overlay": CLIP_NORMALISATION, "final_norm": False, "fc_norm": False, **arguments}
        super().__init__(TIMM_NAME, image_size, **given)
        patch_size: int = self.trunk.embeds.patch_size[0]
        if max_patches is None:
            max_patches = (image_size // patch_size) ** 2
        if max_patches < 1:
            raise ValueError(
                f"an image needs at least one patch: image_size is {image_size}, patch_size {patch_size},"
                f" max_patches {max_patches}"
            )
        self.input_kind = AnyShape(patch_size, max_patches)

    @property
    def prefix_tokens(self) -> int:
        return 0

    def depths(self) -> dict[str, int]:
        """The norm in front of the blocks is as deep as the embeddings; timm groups it with the last block."""
        found = super().depths()
        return found | {name: max(found.values()) for name in found if name.startswith("trunk.norm_pre.")}

    def set_image_size(self, image_size: int) -> None:
        raise ValueError(
            f"this model takes images of any shape, up to {self.input_kind.max_patches} patches, so it has no image"
            " size to change"
        )

    def frozen_part(self) -> Any:
        raise ValueError(
            "features of images of different shapes cannot be stored: set data.cached_augmentations=0, or choose an"
            " image encoder of one image size"
        )

    def forward(self, images: Tensor | Patches) -> EncodedPatches:  # type: ignore[override]
        """images, or of one shape (B, 3, H, W), -> tokens (B, N, width). An output of this method is returned as it
        is.
        """
        if isinstance(images, EncodedPatches):
            return images
        if not isinstance(images, Patches):
            expect_pixels(images)
            expect_batch(images)
            images = Patches.of(images, self.input_kind.patch_size)
        if images.rows.ndim != 3:
            raise ValueError(
                f"patches must have the shape (batch, patches, values), got {tuple(images.rows.shape)}: images[None] is"
                " a batch of one image"
            )
        trunk: Any = self.trunk
        # Padding is no key. As a query it may see the image: what becomes of it is never read.
        mask = images.key_mask(trunk.num_prefix_tokens)
        mean, std = self.normalise.mean.flatten(), self.normalise.std.flatten()
        rows = images.rows.to(mean.dtype)  # (B, N, P·P·3), the channel fastest
        if is_raw(images.rows):
            rows = ((rows.unflatten(-1, (-1, 3)) / 255 - mean) / std).flatten(-2)
        found = trunk.forward_features(rows, images.coords, attn_mask=mask)
        return EncodedPatches(found["patches"][:, trunk.num_prefix_tokens :], images.grids)

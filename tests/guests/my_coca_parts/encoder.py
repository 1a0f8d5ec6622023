"""A user's image encoder. `imports: [my_coca_parts]` in a config registers it before the model is built."""

from torch import Tensor, nn

from coca_lit.models import register_image_encoder


@register_image_encoder("my_patch_mixer")
class PatchMixer(nn.Module):
    """Square patches through two layers: images (B, 3, H, W), normalised -> tokens (B, S, C)."""

    def __init__(self, image_size: int, patch_size: int = 8, width: int = 48) -> None:
        super().__init__()
        self.width = width
        self.patches = nn.Conv2d(3, width, patch_size, patch_size)
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # (B, S, C)
        return tokens + self.mix(tokens)

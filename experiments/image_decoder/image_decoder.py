"""An extension of coca_lit from outside: an image decoder as an objective, with a callback and an experiment YAML.

The last idea of OpenCLIP's CoCa report, in small: draw the image from its caption. Learned queries, one for each patch
of a coarse grid, attend to the states of the caption in the text tower; the output becomes pixels. The mean squared
error teaches the text tower what things look like. A caption leaves much open (of a scene the background and the exact
positions), so the best drawing is the mean of all images that the caption fits: edges stay soft.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.models import CoCa
from coca_lit.training.objectives import Objective

ENLARGED = 128  # pixels of a drawing on the sheet


class ImageDecoder(Objective):
    """A small transformer from text states to an image.

    Args:
        weight: factor of the loss.
        size: side of the drawing in pixels, a multiple of `patch`; images are averaged down to it.
        patch: side of a patch in pixels.
        layers, heads: of the transformer, whose width is that of the text tower.
    """

    def __init__(self, weight: float = 1.0, size: int = 32, patch: int = 4, layers: int = 2, heads: int = 3) -> None:
        super().__init__(image_decoder=weight)
        if size % patch:
            raise ValueError(f"size ({size}) must be a multiple of patch ({patch})")
        self.size, self.patch, self.layers, self.heads = size, patch, layers, heads

    def build(self, net: CoCa) -> None:
        width = net.config.text_width
        if width % self.heads:
            raise ValueError(f"the text width ({width}) must be a multiple of heads ({self.heads})")
        self.query = nn.Parameter(torch.randn((self.size // self.patch) ** 2, width))
        self.norm_text = nn.LayerNorm(width)
        shape: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerDecoderLayer(width, self.heads, 4 * width, **shape)
        self.blocks = nn.TransformerDecoder(layer, self.layers, norm=nn.LayerNorm(width))
        self.pixels = nn.Linear(width, 3 * self.patch**2)

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error of the pixels, which lie in [0, 1]. Raises ValueError if the batch has none."""
        if not isinstance(batch.images, Tensor) or batch.images.ndim != 4:
            raise ValueError("the image decoder learns from pixels of one size, not from patches or cached features")
        images = F.adaptive_avg_pool2d(batch.images.to(self.query.dtype) / 255, self.size)
        drawn = self.draw(net, batch.tokens, batch.lengths)
        return {"image_decoder": F.mse_loss(drawn.float(), images.float())}

    def draw(self, net: CoCa, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, L) -> drawings (B, 3, size, size), about in [0, 1]."""
        states, _, _ = net.text(tokens, lengths, contrastive=False, packed=False)  # (B, T, D)
        padding = torch.arange(states.shape[1], device=lengths.device) >= lengths[:, None]  # (B, T)
        queries = self.query.expand(len(tokens), -1, -1)  # (B, P, D), P patches
        patches = self.pixels(self.blocks(queries, self.norm_text(states), memory_key_padding_mask=padding))
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (self.size // self.patch, -1)), self.patch)


class Drawings(L.Callback):
    """Writes `samples/drawings.png` when training ends: the first images of the validation set and, beside each, what
    is drawn from its caption. The report shows every sheet in `samples/`.

    Args:
        output_dir: the run folder.
        count: number of captions.
    """

    def __init__(self, output_dir: str | Path, count: int = 12) -> None:
        self.path, self.count = Path(output_dir) / "samples" / "drawings.png", count
        self._batch: Batch | None = None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            self._batch = batch

    @torch.no_grad()
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        decoder = next((m for m in pl_module.modules() if isinstance(m, ImageDecoder)), None)
        net = pl_module.net
        if decoder is None or self._batch is None or not trainer.is_global_zero or not isinstance(net, CoCa):
            return
        images, tokens = self._batch.images[: self.count], self._batch.tokens[: self.count]
        assert isinstance(images, Tensor)  # or the decoder could not have learned from it
        drawn = decoder.eval().draw(net.eval(), tokens, self._batch.lengths[: self.count])
        captions = [net.tokenizer.decode(row) for row in tokens]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        sheet(captions, images.float() / 255, drawn.float()).save(self.path)


def sheet(captions: Sequence[str], images: Tensor, drawings: Tensor) -> Image.Image:
    """Two columns of captions, each with the image on the left and the drawing on the right. Pixels in [0, 1]."""
    width, height, line = 2 * ENLARGED + 28, ENLARGED + 48, 15
    page = Image.new("RGB", (2 * width, -(-len(captions) // 2) * height), "white")
    draw = ImageDraw.Draw(page)
    for i, caption in enumerate(captions):
        x, y = i % 2 * width + 10, i // 2 * height + 4
        for text in textwrap.wrap(caption, width=48, max_lines=2, placeholder=" …"):
            draw.text((x, y), text, fill=(25, 25, 30), font=ImageFont.load_default(size=11))
            y += line
        for place, pixels in enumerate((images[i], drawings[i])):
            page.paste(_picture(pixels), (x + place * (ENLARGED + 8), i // 2 * height + 2 * line + 8))
    return page


def _picture(pixels: Tensor) -> Image.Image:
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array).resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST)

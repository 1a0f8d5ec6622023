"""Draws `architecture.png`, the figure of the README. Its shapes are those that a forward pass of the preset has.

python .docs/architecture.py
"""

from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from coca_lit.models import CoCa, create_model

PRESET = "coca_ViT-B-32"
NEEDS = ("image_features", "text_features", "encoded", "image_tokens", "text_states")
PICTURE = Path(__file__).with_name("architecture.png")
PART, DATA, LOSS = "#d6e4f5", "#f2f2f2", "#fbdcc4"  # colours of what is trained, of what goes in and out, of losses
TOP, MIDDLE, BOTTOM = 41, 25, 9  # of the image, of what compares both, of the text


def main() -> None:
    with torch.device("meta"):
        net = create_model(PRESET)
    matplotlib.use("agg")
    figure = plt.figure(figsize=(10.4, 4.1))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 113), ylim=(3, 47))
    axis.axis("off")
    draw(axis, net)
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


def draw(axis: Axes, net: CoCa) -> None:
    sizes, pixels = net.config, torch.empty(1, 3, net.image_size, net.image_size, device="meta")
    tokens = torch.ones(1, sizes.context_length, dtype=torch.long, device="meta")
    out = net(pixels, tokens, torch.tensor([sizes.context_length]), needs=NEEDS)

    box(axis, 8, TOP, 14, "image", shape_of(pixels), DATA)
    box(axis, 27, TOP, 16, "image encoder", "of timm, or your own", PART)
    box(axis, 51, TOP, 18, "attentional pooler", f"{sizes.pooler_queries} learned queries", PART)
    box(axis, 51, MIDDLE + 6, 18, "image features", shape_of(out.image_features), DATA, height=6)
    box(axis, 51, MIDDLE - 6, 18, "text features", shape_of(out.text_features), DATA, height=6)
    box(axis, 71, MIDDLE, 15, "contrastive loss", "batch × batch", LOSS)
    box(axis, 8, BOTTOM, 14, "caption", f"at most {sizes.context_length} tokens", DATA)
    box(axis, 33, BOTTOM, 26, "text tower", f"{sizes.text_layers} causal layers, then CLS", PART)
    box(axis, 93, MIDDLE, 18, "decoder", "", PART, height=14)
    axis.text(
        93,
        MIDDLE - 1.5,
        f"{sizes.decoder_layers} × self-attention\nand cross-attention",
        ha="center",
        va="center",
        size=8.5,
    )
    box(axis, 104.5, BOTTOM, 15, "caption loss", f"next of {net.tokenizer.vocab_size:,}", LOSS)

    arrow(axis, (15, TOP), (19, TOP))
    arrow(axis, (35, TOP), (42, TOP), shape_of(out.encoded))
    arrow(axis, (51, TOP - 4), (51, MIDDLE + 9))
    arrow(axis, (60, MIDDLE + 6), (63.5, MIDDLE + 2))
    arrow(axis, (60, MIDDLE - 6), (63.5, MIDDLE - 2))
    arrow(axis, (60, TOP), (93, TOP), f"image tokens, {shape_of(out.image_tokens)}", end=(93, MIDDLE + 7))
    arrow(axis, (15, BOTTOM), (20, BOTTOM))
    arrow(axis, (41, BOTTOM + 4), (41, MIDDLE - 6), end=(42, MIDDLE - 6))
    axis.text(40, MIDDLE - 8.5, "CLS", ha="right", va="center", size=8.5)
    arrow(axis, (46, BOTTOM), (89, BOTTOM), f"token states, {shape_of(out.text_states)}", end=(89, MIDDLE - 7))
    arrow(axis, (98, MIDDLE - 7), (98, BOTTOM + 4))


def shape_of(tensor: Tensor) -> str:
    """Of one sample."""
    return " × ".join(map(str, tensor.shape[1:]))


def box(axis: Axes, x: float, y: float, width: float, title: str, below: str, colour: str, height: float = 8) -> None:
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=1"
    axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor="#555555", lw=0.8))
    rise = min(1.4, height / 5) if below or height > 8 else 0
    axis.text(x, y + (2.6 if height > 8 else rise), title, ha="center", va="center", size=10.5)
    axis.text(x, y - rise - 0.2, below, ha="center", va="center", size=8.5)


def arrow(
    axis: Axes,
    start: tuple[float, float],
    corner: tuple[float, float],
    text: str = "",
    end: tuple[float, float] | None = None,
) -> None:
    """From start to corner, from there to end, if there is one, with a text above the first stretch."""
    if end is not None:
        axis.plot(*zip(start, corner, strict=True), color="#333333", lw=1.2, solid_capstyle="round")
    tip, tail = (end, corner) if end is not None else (corner, start)
    axis.annotate(
        "", tip, tail, arrowprops={"arrowstyle": "-|>", "color": "#333333", "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    )
    axis.text((start[0] + corner[0]) / 2, start[1] + 1.2, text, ha="center", size=8.5)


if __name__ == "__main__":
    main()

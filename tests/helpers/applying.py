"""What the tests of `coca-caption` and `coca-search` share: a model, and the commands inside the test process."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from coca_lit import build_transform
from coca_lit.cli.command import compose
from coca_lit.models import CoCa, create_model
from coca_lit.tools.caption import command as caption_cli
from coca_lit.tools.search import command as search_cli

RUN = {"caption": caption_cli.run, "search": search_cli.run}
QUIET = ("num_workers=0", "precision=fp32")


def new_model(seed: int = 0, **overrides: Any) -> CoCa:
    torch.manual_seed(seed)
    return create_model("coca_tiny", **overrides).eval()


def run(command: str, *overrides: str) -> Any:
    """What the command does with these overrides."""
    return RUN[command](compose(command, overrides))


def caption(*overrides: str) -> None:
    run("caption", *QUIET, *overrides)


@torch.no_grad()
def naive_captions(model: CoCa, path: Path, **options: Any) -> list[str]:
    """Captions of one image, from the model directly."""
    pixels = build_transform(size=model.image_size)(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    ids = model.generate(pixels[None], **{"strategy": "beam"} | options)
    return [model.tokenizer.decode(row) for row in ids.flatten(0, -2)]

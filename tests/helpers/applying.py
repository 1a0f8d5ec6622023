"""What the tests of `coca-caption` and `coca-search` share: a model, and the commands inside the test process."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from coca_lit import build_transform, save_model
from coca_lit.cli.command import compose
from coca_lit.data.scenes.render import render
from coca_lit.models import CoCa, create_model
from coca_lit.tools.caption import command as caption_cli
from coca_lit.tools.prepare.scenes import write_shards
from coca_lit.tools.search import command as search_cli

RUN = {"caption": caption_cli.run, "search": search_cli.run}
QUIET = ("num_workers=0", "precision=fp32")


def new_model(seed: int = 0, **overrides: Any) -> CoCa:
    torch.manual_seed(seed)
    return create_model("coca_tiny", **overrides).eval()


def fill(folder: Path, photos: int, samples: int, per_shard: int) -> Path:
    """A checkpoint, photos/ of which number 4 is broken, and shards/."""
    save_model(new_model(), folder / "tiny.safetensors")
    for name in ("photos", "shards"):
        (folder / name).mkdir()
    for i in range(photos):
        render(i * 37, size=40).save(folder / "photos" / f"{i}.png")
    (folder / "photos" / "4.png").write_bytes(b"broken")
    write_shards(folder / "shards", samples, 40, per_shard=per_shard)
    return folder


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

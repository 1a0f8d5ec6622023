"""The towers of a CLIP as the starting point of a CoCa.

An OpenCLIP CLIP provides the vision transformer up to its last block and the text transformer with its final norm and
projection. Newly initialised are pooling and decoder, which read the image tokens, the CLS embedding of the texts, the
image projection (CLIP's belongs to its class token) and the temperature, which would be far too high for new features.
A CoCa without decoder provides everything, so its features stay the same.
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from coca_lit.models.clip import CLIP, QuickGELU
from coca_lit.models.coca import CoCa
from coca_lit.models.layers import SelfBlock
from coca_lit.models.text import TextTower
from coca_lit.weights.computation import difference

_QUERY = "pooling.generative.query"
# (prefix in CLIP, prefix in CoCa)
_TOWERS = (
    ("image_encoder.trunk.", "image_encoder.trunk."),
    ("blocks.", "text.blocks."),
    ("token_embedding.", "text.token_embedding."),
    ("position_embedding", "text.position_embedding"),
    ("norm.", "text.norm."),
    ("text_projection.", "text.projection."),
)


def towers(source: CLIP | CoCa, model: CoCa) -> dict[str, Tensor]:
    """Tensors of `source`, which has no decoder, under their names in `model`.

    Position embeddings of the text are cut to the context of `model`. Positions of a longer context and further queries
    of the pooler keep their values in `model`.

    Raises:
        ValueError: the towers compute something else than the model's. Shapes are not compared.
    """
    target = model.state_dict()
    if isinstance(source, CoCa):
        return {name: _rows(t, target.get(name)) if name == _QUERY else t for name, t in source.state_dict().items()}
    _check_same_computation(source, model)
    found: dict[str, Tensor] = {}
    for name, tensor in source.state_dict().items():
        for theirs, ours in _TOWERS:
            if name.startswith(theirs) and not name.startswith("image_encoder.trunk.norm."):
                found[ours + name.removeprefix(theirs)] = tensor
    found["text.position_embedding"] = _rows(found["text.position_embedding"], target["text.position_embedding"])
    return found


def parts(names: Iterable[str], model: CoCa) -> list[str]:
    """The shortest list of parts of the model that covers exactly the given tensors."""
    chosen, all_names = dict.fromkeys(names), list(model.state_dict())

    def whole(part: str) -> bool:
        return all(name in chosen for name in all_names if f"{name}.".startswith(f"{part}."))

    found = (next(filter(whole, accumulate(name.split("."), "{}.{}".format))) for name in chosen)
    return list(dict.fromkeys(found))


def _rows(tensor: Tensor, target: Tensor | None) -> Tensor:
    """(n, D) cut to the m rows of the target (m, D), or filled up with its last ones."""
    if target is None or tensor.shape[1:] != target.shape[1:]:
        return tensor
    return torch.cat([tensor[: len(target)], target[len(tensor) :]])


def _check_same_computation(clip: CLIP, model: CoCa) -> None:
    """Compares what shapes do not show."""
    if any(isinstance(module, QuickGELU) for module in clip.modules()):
        raise ValueError(
            "this CLIP computes QuickGELU and CoCa's towers GELU: take one that was trained with GELU, such as "
            "OpenCLIP's models without '-quickgelu'"
        )
    trunk, theirs = model.image_encoder.trunk, clip.image_encoder.trunk
    if not hasattr(trunk, "norm_pre"):
        name = model.config["image_encoder"]
        raise ValueError(f"a CLIP can only start a vision transformer (vit_*_clip_*), and the image encoder is {name}")
    if not isinstance(model.text, TextTower):
        raise ValueError(
            f"a CLIP only starts the built-in text tower, and this model has a {type(model.text).__name__}: leave out"
            " model.net.text_tower, or use init_parts.image_encoder for the image encoder alone"
        )
    heads = [
        ("image encoder", theirs.blocks[0].attn.num_heads, trunk.blocks[0].attn.num_heads),
        ("text tower", cast(SelfBlock, clip.blocks[0]).attention.heads, model.config["text_heads"]),
    ]
    for tower, there, here in heads:
        if there != here:
            raise ValueError(f"the {tower} has {here} heads in the model and {there} in the CLIP")
    images = ("image_encoder.trunk.blocks", "image_encoder.normalise", "interpolation", "resize_mode")
    if differs := difference(model, clip, images):
        fact, ours, its = differs
        raise ValueError(f"the CLIP computes something else: {fact} is {ours!r} in the model and {its!r} in the CLIP")

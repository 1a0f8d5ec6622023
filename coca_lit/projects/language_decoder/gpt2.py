"""A GPT-2 (Radford et al. 2019) in place of the self blocks of the decoder; cross blocks, which it lacks, stay as they
are. The blocks compute the same but for the activation: GPT-2 approximates GELU by a tanh, to within 0.0005.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from coca_lit.distributed import print_rank_zero
from coca_lit.models.coca import CoCa
from coca_lit.models.text import ClassicDecoder
from coca_lit.weights.load import read_state
from coca_lit.weights.start import parts

HEAD_WIDTH = 64  # of all sizes of GPT-2; the tensors do not show it
# (name in Transformers' GPT-2, name in our block); its matrices are (in, out) and ours (out, in)
_BLOCK = (
    ("ln_1", "norm_1"),
    ("attn.c_attn", "attention.qkv"),
    ("attn.c_proj", "attention.out"),
    ("ln_2", "norm_2"),
    ("mlp.c_fc", "mlp.0"),
    ("mlp.c_proj", "mlp.2"),
)


def load_language_model(model: CoCa, path: str | Path, given: Sequence[str] = ()) -> None:
    """Starts the decoder from the GPT-2 in a file and prints what it gave: see `start_decoder`."""
    state = read_state(Path(path)).state
    taken, new = start_decoder(model, state, given)
    print_rank_zero(f"from the language model {path}: {', '.join(parts(taken, model))}")
    print_rank_zero(f"new: {', '.join(parts(new, model)) or 'nothing'}")


@torch.no_grad()
def start_decoder(model: CoCa, state: Mapping[str, Tensor], given: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Copies a GPT-2 into the decoder, layer by layer from the last one down, then its final norm, and embedding and
    vocabulary where they have the shapes of the model's.

    A vocabulary of the same size is taken for the same vocabulary: rows are copied by id.

    Args:
        state: with Transformers' names (GPT2Model, GPT2LMHeadModel).
        given: names of tensors of the model that other weights have given already; they stay.

    Returns:
        The names of the tensors that were taken, and of the decoder's and token embedding's that were not.

    Raises:
        ValueError: this is not a GPT-2, or the model has no decoder or has it already.
    """
    if model.decoder is None:
        raise ValueError("the model has no decoder (decoder_layers=0)")
    if not isinstance(model.decoder, ClassicDecoder):
        raise ValueError(f"a GPT-2 fits the decoder of the built-in text tower, not a {type(model.decoder).__name__}")
    if any(name.startswith("decoder.") for name in given):
        raise ValueError("init_from gives the decoder already: leave out one of the two")
    tensors = _tensors_of_gpt2(state)
    layers = _layers(tensors)
    _check_sizes(tensors, layers, model)
    renamed = _renamed(tensors, layers, blocks=len(model.decoder.self_blocks))
    target = model.state_dict()
    taken = []
    for name, tensor in renamed.items():
        if name not in given and tensor.shape == target[name].shape:
            target[name].copy_(tensor)
            taken.append(name)
    own = [name for name in target if name.startswith(("decoder.", "text.token_embedding."))]
    return taken, [name for name in own if name not in taken and name not in given]


def _tensors_of_gpt2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names in GPT2Model, without the prefix that GPT2LMHeadModel adds."""
    return {
        name.removeprefix("transformer."): tensor
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def _layers(tensors: Mapping[str, Tensor]) -> list[int]:
    """The numbers of the layers; raises `ValueError` if these are not the tensors of a GPT-2."""
    matches = [re.match(r"h\.(\d+)\.attn\.c_attn\.weight$", name) for name in tensors]
    layers = sorted({int(match[1]) for match in matches if match is not None})
    if not layers or "wte.weight" not in tensors:
        raise ValueError("this is not a GPT-2 with Transformers' names: expected wte.weight, h.0.attn.c_attn.weight, …")
    return layers


def _check_sizes(tensors: Mapping[str, Tensor], layers: Sequence[int], model: CoCa) -> None:
    """Raises `ValueError` if the decoder has other sizes than the GPT-2."""
    width = tensors["wte.weight"].shape[-1]
    own_width = model.config.text_width
    if width != own_width:
        raise ValueError(f"this GPT-2 is {width} wide and the decoder {own_width}: set +model.net.text_width={width}")
    for layer in layers:
        shape = tuple(tensors[f"h.{layer}.attn.c_attn.weight"].shape)
        if shape != (width, 3 * width):
            raise ValueError(f"h.{layer}.attn.c_attn.weight is {shape}, expected {(width, 3 * width)} as in a GPT-2")
    if model.config.text_heads * HEAD_WIDTH != width:
        heads = width // HEAD_WIDTH
        raise ValueError(f"GPT-2's heads are {HEAD_WIDTH} wide: set +model.net.text_heads={heads}")


def _renamed(tensors: Mapping[str, Tensor], layers: Sequence[int], blocks: int) -> dict[str, Tensor]:
    """The tensors by their names in `CoCa`: the last of its `blocks` is the last layer."""
    places = {  # name in CoCa -> in GPT-2
        "decoder.norm.weight": "ln_f.weight",
        "decoder.norm.bias": "ln_f.bias",
        "text.token_embedding.weight": "wte.weight",
        "decoder.vocabulary.weight": "lm_head.weight" if "lm_head.weight" in tensors else "wte.weight",
    }
    for layer, block in zip(reversed(layers), reversed(range(blocks)), strict=False):
        for theirs, ours in _BLOCK:
            for kind in ("weight", "bias"):
                places[f"decoder.self_blocks.{block}.{ours}.{kind}"] = f"h.{layer}.{theirs}.{kind}"
    renamed: dict[str, Tensor] = {}
    for ours, theirs in places.items():
        if theirs in tensors:
            tensor = tensors[theirs]
            is_matrix = theirs.startswith("h.") and tensor.ndim == 2
            renamed[ours] = tensor.T if is_matrix else tensor
    return renamed

"""A language model as the starting point of the decoder: GPT-2's blocks (Radford et al. 2019), a trained
language model, replace its self blocks. Cross blocks, which GPT-2 lacks, stay as they are.

The blocks compute the same but for the activation: GPT-2 approximates GELU by a tanh, to within 0.0005.
"""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from coca_lit.models.coca import CoCa
from coca_lit.models.text import ClassicDecoder

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
        ValueError: this is not a GPT-2, the model has no decoder or has it already, or nothing fits.
    """
    if model.decoder is None:
        raise ValueError("the model has no decoder (decoder_layers=0)")
    if not isinstance(model.decoder, ClassicDecoder):
        raise ValueError(f"a GPT-2 fits the decoder of the built-in text tower, not a {type(model.decoder).__name__}")
    if any(name.startswith("decoder.") for name in given):
        raise ValueError("init_from gives the decoder already: leave out one of the two")
    names = {
        name.removeprefix("transformer."): tensor
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    layers = sorted({int(match[1]) for name in names if (match := re.match(r"h\.(\d+)\.attn\.c_attn\.weight$", name))})
    if not layers or "wte.weight" not in names:
        raise ValueError("this is not a GPT-2 with Transformers' names: expected wte.weight, h.0.attn.c_attn.weight, …")
    width, ours = names["wte.weight"].shape[-1], model.config["text_width"]
    if width != ours:
        raise ValueError(f"this GPT-2 is {width} wide and the decoder {ours}: set +model.net.text_width={width}")
    for layer in layers:
        if (shape := tuple(names[f"h.{layer}.attn.c_attn.weight"].shape)) != (width, 3 * width):
            raise ValueError(f"h.{layer}.attn.c_attn.weight is {shape}, expected {(width, 3 * width)} as in a GPT-2")
    if model.config["text_heads"] * HEAD_WIDTH != width:
        heads = width // HEAD_WIDTH
        raise ValueError(f"GPT-2's heads are {HEAD_WIDTH} wide: set +model.net.text_heads={heads}")
    found: dict[str, Tensor | None] = {f"decoder.norm.{kind}": names.get(f"ln_f.{kind}") for kind in ("weight", "bias")}
    found["text.token_embedding.weight"] = names["wte.weight"]
    found["decoder.vocabulary.weight"] = names.get("lm_head.weight", names["wte.weight"])
    blocks = len(model.decoder.self_blocks)
    for layer, block in zip(reversed(layers), reversed(range(blocks)), strict=False):
        for theirs, part in _BLOCK:
            for kind in ("weight", "bias"):
                tensor = names.get(f"h.{layer}.{theirs}.{kind}")
                found[f"decoder.self_blocks.{block}.{part}.{kind}"] = (
                    tensor.T if tensor is not None and tensor.ndim == 2 else tensor
                )
    target = model.state_dict()
    taken = []
    for name, tensor in found.items():
        if tensor is not None and name not in given and tensor.shape == target[name].shape:
            target[name].copy_(tensor)
            taken.append(name)
    parts = [name for name in target if name.startswith(("decoder.", "text.token_embedding."))]
    return taken, [name for name in parts if name not in taken and name not in given]

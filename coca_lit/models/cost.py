"""How large the parts of a model are, and how many operations it takes."""

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coca_lit.models import kernels
from coca_lit.models.inputs import largest_shape


def part_sizes(model: nn.Module) -> dict[str, int]:
    """Parameters of the image encoder with its pooling, the text encoder and the text decoder, as Table 3 of OpenCLIP's
    CoCa report counts them; of a CoCa or a CLIP.
    """
    sizes = {"image encoder": 0, "text encoder": 0, "text decoder": 0}
    for name, parameter in model.named_parameters():
        if name.startswith(("image_", "pooling")):
            sizes["image encoder"] += parameter.numel()
        elif name.startswith("decoder"):
            sizes["text decoder"] += parameter.numel()
        elif not name.startswith("logit_"):
            sizes["text encoder"] += parameter.numel()
    return {part: size for part, size in sizes.items() if size}


def forward_flops(model: Any) -> int:
    """FLOPs of one image with one text of full length, with the logits of its caption if the model has a decoder; a
    multiply-add counts twice. Of a CoCa or a CLIP, which computes them once.
    """
    images = torch.zeros(1, 3, *largest_shape(model.preprocessing), dtype=torch.uint8, device=model.device)
    tokens = torch.ones(1, model.tokenizer.context_length, dtype=torch.long, device=model.device)
    tokens[:, -1] = model.tokenizer.eot_id
    counter = FlopCounterMode(display=False)
    # Fused attention is not counted on a CPU.
    with kernels.disabled(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        if model.decoder is None:
            model.encode_image(images)
            model.encode_text(tokens)
        else:
            _ = model(images, tokens).logits
    return counter.get_total_flops()

"""Initial values of the parameters of CoCa's own layers.

OpenCLIP leaves its vocabulary projection uninitialised and its decoder at PyTorch's defaults; here text tower and
decoder share CLIP's rule (Radford et al. 2021; standard deviations as in openai/CLIP): embeddings 0.02 and 0.01,
projections width^-0.5, outputs of residual branches scaled down by depth.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coca_lit.models.layers import CrossAttention, CrossBlock, SelfAttention, SelfBlock


class Uninitialised(TorchFunctionMode):
    """Within it, no random numbers are drawn for the parameters of what is built: weights of a file replace them, and
    drawing them for a large model takes longer than reading these.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _DRAWS and isinstance(parameter := args[0] if args else kwargs["tensor"], nn.Parameter):
            return parameter
        return function(*args, **(kwargs or {}))


# Draws, also by functions of `torch.nn.init`, and what turns uniform numbers into truncated normal ones.
_DRAWS = {
    *(Tensor.normal_, nn.init.normal_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_, nn.init.uniform_),
    *(Tensor.uniform_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_),
}


def init_projection(linear: nn.Linear) -> None:
    """Keeps the scale of its input."""
    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)


def init_blocks(blocks: Iterable[nn.Module], depth: int) -> None:
    """Initialises blocks of a tower of `depth` blocks. Each adds two branches to the residual stream: the deviation of
    their outputs shrinks so that the sum keeps its scale.
    """
    for block in blocks:
        assert isinstance(block, SelfBlock | CrossBlock)
        width = block.norm_1.normalized_shape[0]
        branch_std = width**-0.5 * (2 * depth) ** -0.5
        init_attention(block.attention, branch_std)
        _init_linear(block.mlp.first, (2 * width) ** -0.5)
        _init_linear(block.mlp.last, branch_std)
        for norm in (m for m in block.children() if isinstance(m, nn.LayerNorm)):
            norm.reset_parameters()


def init_attention(attention: SelfAttention | CrossAttention, out_std: float) -> None:
    for name, linear in attention.named_children():
        assert isinstance(linear, nn.Linear)
        _init_linear(linear, out_std if name == "out" else linear.in_features**-0.5)


def _init_linear(linear: nn.Module, std: float) -> None:
    assert isinstance(linear, nn.Linear)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)

"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv 2106.09685): W + alpha/r · B A is trained and W is not.

The sum is one of PyTorch's parametrizations: reading `weight` returns it, and the rest of the model need not know. A
training checkpoint stores W, A and B, so that a run resumes exactly; reading the model from it returns the sum
(`merged`), an ordinary model.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coca_lit.errors import check_number
from coca_lit.models.coca import CoCa

_INSIDE = ".parametrizations.weight."
PARTS = ("image_encoder", "pooling", "image_projection", "text", "decoder")


class LowRank(nn.Module):
    """W -> W + alpha/r · B A, initially W. A convolution kernel (out, in, h, w) is a matrix (out, in · h · w) here."""

    scale: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        columns = weight[0].numel()
        self.a = nn.Parameter(torch.randn(rank, columns) * columns**-0.5)
        self.b = nn.Parameter(torch.zeros(len(weight), rank))
        self.register_buffer("scale", torch.tensor(alpha / rank))  # in the checkpoint: the sum needs nothing else

    def forward(self, weight: Tensor) -> Tensor:
        return _sum(weight, self.a, self.b, self.scale)


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return weight + scale * (b @ a).view_as(weight)


def add_lora(net: CoCa, rank: int = 8, alpha: float = 16.0, parts: Sequence[str] = PARTS) -> list[str]:
    """Freezes `parts` of the network but for low-rank updates of their matrices and convolution kernels, whose names it
    returns. Other parts train as before, as does what other kinds of input have added; frozen ones stay frozen. A
    matrix that modules share, as with tied embeddings, gets no update, and trains as before if one of them is in
    another part.

    Args:
        rank: r, of the updates; a run without LoRA has 0. Matrices with at most r rows or columns are not updated.
        alpha: the update is multiplied by alpha/rank, so that a good learning rate depends little on the rank.
        parts: names of modules, e.g. text.blocks; or a single one.

    Raises:
        ValueError: a number is out of range, or there is no matrix to update.
    """
    check_number("rank", rank, whole=True, at_least=1)
    check_number("alpha", alpha, above=0)
    parts = [parts] if isinstance(parts, str) else parts
    prefixes = tuple(f"{part}." for part in parts)
    inside = {name: module for name, module in net.named_modules() if f"{name}.".startswith(prefixes)}
    unknown = [part for part in parts if part not in inside]
    if unknown:
        known = ", ".join(name for name, module in net.named_children() if [*module.parameters()])
        raise ValueError(f"parts: nothing in the model is called {', '.join(unknown)}; its parts: {known}")
    named = [*net.named_parameters(remove_duplicate=False)]
    uses: Counter[Tensor] = Counter(parameter for _, parameter in named)
    uses_inside = Counter(parameter for name, parameter in named if name.startswith(prefixes))
    matrices: dict[str, nn.Module] = {}
    for name, module in inside.items():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight
            alone = uses[weight] == 1  # else the other modules that share it would not have the update
            if weight.requires_grad and alone and rank < min(len(weight), weight[0].numel()):
                matrices[name] = module
    if not matrices:
        raise ValueError(f"no matrix in {', '.join(parts)} is trained and has more than {rank} rows and columns")
    added = {getattr(net.pooling, name) for name in net.pooling.added}
    for parameter, count in uses_inside.items():
        if count == uses[parameter] and parameter not in added:
            parameter.requires_grad_(False)
    net.freeze(*(name for name, module in inside.items() if isinstance(module, nn.modules.batchnorm._BatchNorm)))
    for module in matrices.values():
        weight = module.get_parameter("weight")
        parametrize.register_parametrization(module, "weight", LowRank(weight, rank, alpha))
    return [f"{name}.weight" for name in matrices]


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an ordinary model: the sum replaces W, A and B."""
    found = dict(state)
    for name in state:
        module, _, last = name.partition(_INSIDE)
        names = [f"{module}{_INSIDE}{part}" for part in ("original", "0.a", "0.b", "0.scale")]
        if last == "original" and all(name in state for name in names):  # and no other parametrization
            _, a, b, scale = map(found.pop, names)
            matrices = (a.ndim, b.ndim, scale.ndim) == (2, 2, 0)
            if not matrices or len(b) * a.shape[1] != state[name].numel():
                raise ValueError(f"the low-rank update of '{module}' has another size")
            found[f"{module}.weight"] = _sum(state[name], a, b, scale)
    return found

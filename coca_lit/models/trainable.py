"""What is frozen, recomputed or compiled in a network that is trained."""

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coca_lit.errors import check_choice

if TYPE_CHECKING:
    from coca_lit.models.image import ImageEncoder
    from coca_lit.models.text import Decoder, Tower

GradCheckpointing = Literal["none", "cross_attention", "blocks"]
RECOMPILE_LIMIT = 32  # graphs of a block


class Trainable(nn.Module):
    """A network of which parts can be frozen, recomputed in the backward pass, or compiled."""

    image_encoder: "ImageEncoder"
    text: "Tower"
    decoder: "Decoder | None"

    def __init__(self) -> None:
        super().__init__()
        self._frozen: set[str] = set()  # names of modules

    def freeze(self, *names: str) -> list[str]:
        """Freezes the modules and parameters called `names` for good, and returns the names of the parameters.

        A name may be a pattern: `image_encoder.trunk.blocks.[0-4]` are five stages. Whole modules also stay in
        evaluation mode, so that batch norms keep their statistics and dropout stays off. A parameter that modules
        share belongs to the first of them, so that the tower above a frozen decoder trains; a name of its own in
        another one freezes it too.

        Raises:
            ValueError: no parameter has such a name.
        """
        own = list(self.named_parameters())
        every = list(self.named_parameters(remove_duplicate=False))
        found = {
            name: {n for n, _ in own if _is_part(n, name)} or {n for n, _ in every if _is_part(n, name)}
            for name in names
        }
        parameters = [(n, p) for n, p in every if any(n in inside for inside in found.values())]
        unknown = [name for name, inside in found.items() if not inside]
        if unknown:
            parts = ", ".join(name for name, _ in self.named_children())
            raise ValueError(f"nothing in the model is called {', '.join(unknown)}; parts that can be frozen: {parts}")
        for _, parameter in parameters:
            parameter.requires_grad_(False)
        self._frozen.update(n for n, _ in self.named_modules() if n and any(fnmatchcase(n, name) for name in names))
        self.train(self.training)
        return [name for name, _ in parameters]

    def trained_modules(self) -> Iterator[nn.Module]:
        """The modules that are in training mode while the network is trained."""
        for name, module in self.named_modules():
            if not any(f"{name}.".startswith(f"{frozen}.") for frozen in self._frozen):
                yield module

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self._frozen:
            self.get_submodule(name).eval()
        return self

    def set_grad_checkpointing(self, kind: GradCheckpointing = "blocks") -> None:
        """Sets what the backward pass recomputes instead of keeping it.

        blocks: every transformer block, for about a third more time. cross_attention: the decoder's cross blocks, whose
        keys and values of the image tokens are the largest tensors that short captions leave, for about 6 % more.
        """
        check_choice("grad_checkpointing", kind, get_args(GradCheckpointing))
        self.image_encoder.set_grad_checkpointing(kind == "blocks")
        for part in (self.text, self.decoder):
            if part is not None:
                part.grad_checkpointing = kind

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Runs every transformer block through `torch.compile`, in place: names in checkpoints stay the same.

        Equal blocks share their code, and what depends on the lengths of the captions stays outside, so there are a
        few compilations in the first steps (the second length makes it a variable) and none after: one for each kind
        of text, packed or padded, with a mask or without, in training and in validation, which is more than the eight
        that PyTorch allows a function.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        of_image = (module for module in self.image_encoder.modules() if isinstance(module, Block))
        of_decoder = self.decoder.layers() if self.decoder is not None else []
        for block in (*of_image, *self.text.blocks, *(module for layer in of_decoder for module in layer)):
            block.compile(backend=backend)


def run(function: Callable[..., Tensor], *arguments: Any, recompute: bool) -> Tensor:
    """`function(*arguments)`, whose activations are kept for the backward pass or computed again there."""
    if not recompute:
        return function(*arguments)

    def call(*arguments: Any) -> Tensor:
        # Autocast would keep its casts of all weights until the forward pass ends: here they go with the activations.
        device = next(x.device.type for x in arguments if isinstance(x, Tensor))
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            return function(*arguments)

    return checkpoint(call, *arguments, use_reentrant=False)


def _is_part(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")

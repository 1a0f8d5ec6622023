"""The parts of a network by name: how large they are, and which of them are frozen."""

from fnmatch import fnmatchcase
from typing import Self

from torch import nn


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


class Freezable(nn.Module):
    """A network of which parts can be frozen for good."""

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
        own, every = list(self.named_parameters()), list(self.named_parameters(remove_duplicate=False))
        found = {
            name: {n for n, _ in own if _is_part(n, name)} or {n for n, _ in every if _is_part(n, name)}
            for name in names
        }
        parameters = [(n, p) for n, p in every if any(n in inside for inside in found.values())]
        if unknown := [name for name, inside in found.items() if not inside]:
            parts = ", ".join(name for name, _ in self.named_children())
            raise ValueError(f"nothing in the model is called {', '.join(unknown)}; parts that can be frozen: {parts}")
        for _, parameter in parameters:
            parameter.requires_grad_(False)
        self._frozen.update(n for n, _ in self.named_modules() if any(fnmatchcase(n, name) for name in names))
        self.train(self.training)
        return [name for name, _ in parameters]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name, module in self.named_modules():
            if name in self._frozen:
                module.eval()
        return self


def _is_part(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")

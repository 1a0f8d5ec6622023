"""Networks of which parts can be frozen by name."""

from fnmatch import fnmatchcase
from typing import Self

from torch import nn


class Freezable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._frozen: set[str] = set()  # names of modules

    def freeze(self, *names: str) -> list[str]:
        """Freezes the modules and parameters called `names` for good, and returns the names of the parameters.

        A name may be a pattern: `image_encoder.trunk.blocks.[0-4]` are five stages. Whole modules also stay in
        evaluation mode, so that batch norms keep their statistics and dropout stays off.

        Raises:
            ValueError: no parameter has such a name.
        """
        parameters = [(n, p) for n, p in self.named_parameters() if any(_is_part(n, name) for name in names)]
        if unknown := [name for name in names if not any(_is_part(n, name) for n, _ in parameters)]:
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

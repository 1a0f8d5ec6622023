"""Checks of objectives that are kept with the model and classify."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.lit_module import CoCaLit
from coca_lit.models import CoCa
from coca_lit.projects.classification.classifier import Classifier
from coca_lit.training.optim import AdamW
from coca_lit.weights import MODEL_KEY, OBJECTIVES_KEY
from coca_lit.weights.load import load_model, save_model


class Guess(Classifier):
    """Logits that are right in two thirds of the cases."""

    def __init__(self, classes: Any) -> None:
        super().__init__(list(classes), labels=1.0)

    def logits(self, net: Any, records: Any, batch_size: int = 64, num_workers: int = 0) -> Tensor:
        torch.manual_seed(1)
        right = torch.tensor(
            [
                (self.classes * 2 + [record.captions[0]]).index(record.captions[0]) % len(self.classes)
                for record in records
            ]
        )
        return torch.randn(len(records), len(self.classes)) + torch.eye(len(self.classes))[right]


def with_guess(classes: Any) -> Any:
    """A model that has nothing but a classifier."""
    return SimpleNamespace(objectives={"labels": Guess(classes)})


def check_that_files_keep(classifier: Any, net: CoCa, records: Sequence[Record], folder: Path) -> None:
    """Checkpoints and exports hold it, and it classifies as before."""
    optimizer = AdamW(lr=1e-3)
    module = CoCaLit(net, optimizer, 0, 0.0, 0.0, objectives={"mine": classifier})
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path := folder / "last.ckpt")
    model = load_model(path)
    (loaded,) = model.objectives.values()
    assert type(loaded) is type(classifier)
    assert loaded.config == classifier.config
    own = checkpoint | {OBJECTIVES_KEY: {"own": {"labels": ["a"]}} | checkpoint[OBJECTIVES_KEY]}  # a user's objective
    torch.save(own, folder / "own.ckpt")
    assert load_model(folder / "own.ckpt").objectives["mine"].config == classifier.config
    torch.testing.assert_close(loaded.state_dict(), classifier.state_dict())
    save_model(model, folder / "model.safetensors")
    exported = load_model(folder / "model.safetensors").objectives["mine"]
    torch.testing.assert_close(exported.state_dict(), classifier.state_dict(), rtol=0, atol=0)
    plain: dict[str, Any] = {"state_dict": module.state_dict()}
    CoCaLit(net, optimizer).on_save_checkpoint(plain)
    torch.save(plain, path)
    assert load_model(path).objectives == {}
    exact = loaded.logits(net, records)
    rounded = loaded.logits(net.bfloat16(), records)  # as coca-evaluate precision=bf16
    torch.testing.assert_close(rounded, exact, atol=0.05 * float(exact.abs().max()), rtol=0)


def checkpoint_of(net: CoCa, state: dict[str, Tensor], described: Any) -> dict[str, Any]:
    network = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    return {"state_dict": network | state, MODEL_KEY: net.config.stored(), OBJECTIVES_KEY: described}

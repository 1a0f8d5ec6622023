"""How hard are the statements for who sees without pixels? Linear and two-layer classifiers on what is shown and said.

    python experiments/tasks/attributes.py     # half a minute on one core

The inputs are one-hot: axis, and colour, shape or cover of each place; and the word at each place of the statement. The
classifiers get the training statements as often as `experiment=scenes_entailment` and `scenes_comparison`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.data.records import Record
from coca_lit.data.scenes.render import AXES, COLOURS, SHAPES, decode
from coca_lit.models.presets import VOCABULARIES
from coca_lit.projects.reasoning.scene_statements import LABELS, OBJECTS, TRUTHS, comparison_records, entailment_records

WORDS = 10  # of a statement at most
EPOCHS, BATCH = 4, 64
TASKS: dict[str, tuple[Callable[[str], list[Record]], Sequence[str]]] = {
    "entailment": (entailment_records, LABELS),
    "comparison": (comparison_records, TRUTHS),
}


def shown(record: Record) -> list[int]:
    """One-hot."""
    found: list[int] = []
    for image in record.images:
        number, covered, _ = cast(partial[object], image).args
        scene = decode(number, OBJECTS)
        found += [scene.axis == axis for axis in AXES]
        for place, thing in enumerate(scene.things):
            seen = () if place == covered else thing
            found += [name in seen for name in (*COLOURS, *SHAPES)] + [place == covered]
    return found


def said(record: Record) -> list[int]:
    """One-hot."""
    words = [*record.question.split(), *[""] * WORDS][:WORDS]
    return [word == known for word in words for known in VOCABULARIES["scenes_statements"]]


def accuracies(net: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Tensor:
    """Trains, and returns which test statements are right (I,)."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    inputs, labels = train
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    return (net(test[0]).argmax(dim=1) == test[1]).float()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for task, (records_of, classes) in TASKS.items():
        records = {split: records_of(split) for split in ("train", "test")}
        train, test = (
            (
                torch.tensor([shown(r) + said(r) for r in of_split], dtype=torch.float32),
                torch.tensor([classes.index(r.captions[0]) for r in of_split]),
            )
            for of_split in records.values()
        )
        width = train[0].shape[1]
        nets = {
            "linear": nn.Linear(width, len(classes)),
            "two layers of 256": nn.Sequential(
                *(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, len(classes)))
            ),
        }
        kinds = [str(record.domain) for record in records["test"]]
        for name, net in nets.items():
            right = accuracies(net, train, test)
            of_kind = {
                kind: right[[i for i, its in enumerate(kinds) if its == kind]].mean().item()
                for kind in dict.fromkeys(kinds)
            }
            every = ", ".join(f"{kind} {100 * value:.1f}" for kind, value in of_kind.items())
            print(f"{task}, {name}: {100 * right.mean():.1f} % right ({every})", flush=True)


if __name__ == "__main__":
    main()

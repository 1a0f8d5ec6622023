"""Scores of the labels that a classifier gives which was trained beside the network."""

from collections.abc import Hashable, Sequence
from typing import cast

import numpy as np
import torch

from coca_lit.data.records import Record
from coca_lit.distributed import rank
from coca_lit.errors import DataError
from coca_lit.evals.base import Evaluation, Settings, kept_objective
from coca_lit.evals.samples import caption_samples, sample_sheet
from coca_lit.metrics.classification import class_ranks
from coca_lit.metrics.uncertainty import Ratios, Units
from coca_lit.models import CoCa, DualEncoder
from coca_lit.projects.classification.classifier import Classifier

TOP5 = 10  # labels from which on five guesses say something

Parts = dict[str, tuple[np.ndarray, np.ndarray | None]]
"""For `Ratios`: numerator and denominator of each score, by unit."""


class LabelScores(Evaluation):
    """Accuracy of the labels that a classifier kept with the model gives, for each kind too, and from ten classes on
    "top5".

    Images are drawn for the intervals, each with all its records. A class that ties with the right one counts as
    chosen.

    Args:
        records: each with its label as the first caption.
    """

    captioned = True
    generates = False
    score_names = ("accuracy",)
    final_score_names = None

    def compared_texts(self, records: Sequence[Record]) -> Sequence[str]:
        """The texts, then the labels."""
        return [*(record.question for record in records), *(record.captions[0] for record in records)]

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        classifier = kept_objective(model, Classifier)
        if classifier is None:
            self.not_run[f"{self.name} labels"] = (
                "the model has no classifier: name the run or checkpoint that trained one; one of a class of your own "
                "needs `register_objective` and imports=[…]"
            )
            return {}
        classes = list(classifier.classes)
        net = cast(CoCa, model)  # a CLIP keeps no objectives
        logits = classifier.logits(net, records, settings.batch_size, settings.workers)  # (I, N)
        labels = _class_numbers(records, classes)
        ranks = class_ranks(logits, labels).numpy()  # (I,)
        if settings.full and rank() == 0:
            chosen = logits.argmax(dim=1).tolist()
            self.write_predictions(records, [classes[number] for number in chosen], settings)
        units = Units(self.unit_of(record) for record in records)
        parts = self.parts(records, ranks == 0, units, settings)
        if len(classes) >= TOP5:
            parts["top5"] = units.mean(ranks < 5)
        return self.resample([records[i].id for i in units.first], Ratios(parts), settings)

    def unit_of(self, record: Record) -> Hashable:
        """What a record shares with those that are drawn together with it."""
        return record.image_key

    def parts(self, records: Sequence[Record], is_right: np.ndarray, units: Units, settings: Settings) -> Parts:
        """The scores of labels that are right or not (I,)."""
        return {score: units.mean(is_right, rows) for score, rows in rows_by_accuracy(records).items()}

    def write_predictions(self, records: Sequence[Record], chosen: Sequence[str], settings: Settings) -> None:
        by_id = {record.id: label for record, label in zip(records, chosen, strict=True)}
        rows = [{"id": id, "label": label} for id, label in by_id.items()]
        settings.write_json("predictions", f"{self.name}.json", rows)
        settings.write_json("samples", f"{self.name}_captions.json", caption_samples(records, by_id))
        settings.write_image("samples", f"{self.name}.png", sample_sheet(records, by_id))


def rows_by_accuracy(records: Sequence[Record]) -> dict[str, list[int]]:
    """The numbers of the records that an accuracy is of: "accuracy" of all, and "number/accuracy" of each kind, the
    domain of a record.
    """
    rows = {"accuracy": list(range(len(records)))}
    for number, record in enumerate(records):
        if record.domain:
            rows.setdefault(f"{record.domain}/accuracy", []).append(number)
    return rows


def _class_numbers(records: Sequence[Record], classes: Sequence[str]) -> torch.Tensor:
    """(I,) of the labels; raises `DataError` for a label that is no class."""
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = [record for record in records if record.captions[0] not in numbers]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(records)} records have a label that the classifier lacks, e.g. "
            f"{unknown[0].captions[0]!r:.80}: it was trained on {', '.join(classes[:5])}"
        )
    return torch.tensor([numbers[record.captions[0]] for record in records])

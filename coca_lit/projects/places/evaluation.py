"""Scores of answers that are boxes, or names of what is in a box."""

from collections.abc import Sequence

import numpy as np

from coca_lit.data.records import Record
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.metrics.uncertainty import Ratios, Units
from coca_lit.models import DualEncoder
from coca_lit.projects.places.boxes import overlap, read_box
from coca_lit.projects.reasoning.written_answers import generate_answers
from coca_lit.tokenizer import Tokenizer

LEAST_OVERLAP = 0.5  # intersection over union of a box that counts as right


class PlaceScores(Evaluation):
    """The share of boxes that overlap the true one by at least `LEAST_OVERLAP`, and of things in a box that are named
    in the same words, see `coca_lit.projects.places.boxes`.

    Args:
        records: questions; an answer with a box is asked for one.
    """

    captioned = True
    score_names = ("box_accuracy", "name_accuracy")

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        if model.decoder is None:
            self.not_run[f"{self.name} places"] = "the model has no decoder, so it writes no answers"
            return {}
        if not all(can_write(model.tokenizer, record.captions[0]) for record in records if asks_for_box(record)):
            self.not_run[f"{self.name} boxes"] = "the tokenizer takes boxes apart: train with a vocabulary of words"
            records = [record for record in records if not asks_for_box(record)]
        if not records:
            return {}
        answers = generate_answers(model, records, settings.batch_size, settings.workers, settings.generate or {})
        right = np.array([is_right(answers[record.id], record.captions[0]) for record in records])
        of_box = np.array([asks_for_box(record) for record in records])
        units = Units(record.image_key for record in records)
        shares = {}
        for score, rows in (("box_accuracy", of_box), ("name_accuracy", ~of_box)):
            if rows.any():
                shares[score] = units.mean(right, rows)
        return self.resample([records[i].id for i in units.first], Ratios(shares), settings)


def asks_for_box(record: Record) -> bool:
    return read_box(record.captions[0]) is not None


def can_write(tokenizer: Tokenizer, box: str) -> bool:
    """Whether tokens keep the box of a text."""
    return read_box(tokenizer.decode(tokenizer.encode(box))) == read_box(box)


def is_right(answer: str, truth: str) -> bool:
    """Of a box whether it overlaps the true one, of a name whether it is the same."""
    true_box = read_box(truth)
    if true_box is None:
        return answer.split() == truth.split()
    box = read_box(answer)
    return box is not None and overlap(box, true_box) >= LEAST_OVERLAP

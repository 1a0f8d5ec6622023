"""Boxes and names that the decoder writes when it is asked for a place."""

from collections.abc import Sequence

import numpy as np

from coca_lit.data.records import Record
from coca_lit.data.scenes.places import overlap, read_box
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.vqa import generate_answers
from coca_lit.metrics.uncertainty import bootstrap, ratios
from coca_lit.models import DualEncoder

LEAST = 0.5  # intersection over union of a box that counts as right


class PlaceScores(Evaluation):
    """The share of boxes that overlap the true one by at least `LEAST`, and of things in a box that are named in the
    same words, see `coca_lit.data.scenes.places`.

    Args:
        records: questions; an answer with a box is asked for one.
    """

    captioned = True
    score_names = ("box_accuracy", "name_accuracy")

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        if model.decoder is None:
            self.not_run[f"{self.name} places"] = "the model has no decoder, so it writes no answers"
            return {}
        answers = generate_answers(model, records, settings.batch_size, settings.workers, settings.generate or {})
        places = {image: i for i, image in enumerate(dict.fromkeys(record.image for record in records))}
        right, asked = np.zeros((2, 2, len(places)))  # (kind, images)
        for record in records:
            kind = int(read_box(record.captions[0]) is None)
            right[kind, places[record.image]] += is_right(answers[record.id], record.captions[0])
            asked[kind, places[record.image]] += 1
        given = [kind for kind in (0, 1) if asked[kind].any()]
        if settings.full:
            parts = {self.score_names[kind]: (right[kind], asked[kind]) for kind in given}
            self.draws = bootstrap([*places.values()], ratios(parts))
        return {self.score_names[kind]: float(right[kind].sum() / asked[kind].sum()) for kind in given}


def is_right(answer: str, truth: str) -> bool:
    """Of a box whether it overlaps the true one, of a name whether it is the same."""
    true_box = read_box(truth)
    if true_box is None:
        return answer.split() == truth.split()
    box = read_box(answer)
    return box is not None and overlap(box, true_box) >= LEAST

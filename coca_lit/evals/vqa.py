"""Scores of answers to questions about images."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from coca_lit.data.records import Record
from coca_lit.distributed import rank
from coca_lit.errors import DataError
from coca_lit.evals.answers import generate_answers
from coca_lit.evals.base import Evaluation, Settings, kept_with
from coca_lit.evals.samples import caption_samples, sample_sheet
from coca_lit.metrics.uncertainty import Draws, Ratios, Units, bootstrap
from coca_lit.metrics.vqa import blind_answers, enough_people, vqa_accuracy
from coca_lit.models import DualEncoder

Answers = dict[int | str, str]  # by question id
T = TypeVar("T")


class VQAScores(Evaluation):
    """Accuracy of written answers, and of the answers of a classifier kept with the model, if there is one, and for
    each kind of answer. With `settings.full` also of the best guess of somebody who does not look ("blind").

    Predictions are written in the official results format, also for questions whose answers are not public.

    Args:
        records: questions, see `coca_lit.data.datasets.vqa`.
        training_records: returns the training questions, from which the blind guesses come; None for no such score.
    """

    score_names = ("accuracy",)

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        training_records: Callable[[], Sequence[Record]] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(name, records, every)
        self.training_records = training_records

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        public = all(record.captions for record in records)
        if not settings.full and (model.decoder is None or not public):
            return {}
        if model.decoder is None:
            self.not_run[f"{self.name} answers"] = "the model has no decoder, so it writes no answers"
            return {}
        size, workers = settings.batch_size, settings.workers
        # By the way in which they were found: "" by generation.
        answers = {"": generate_answers(model, records, size, workers, settings.generate or {})}
        classifier = kept_with(model, "classes", "logits")
        if classifier is not None:
            likeliest = classifier.logits(model, records, size, workers).argmax(dim=1).tolist()
            classes = classifier.classes
            answers["classifier"] = {record.id: classes[i] for record, i in zip(records, likeliest, strict=True)}
        if not settings.full:
            return _accuracies(records, answers, full=False)[0]
        if rank() == 0:
            for way, found in answers.items():
                predictions = [{"question_id": id, "answer": answer} for id, answer in found.items()]
                settings.write_json("predictions", f"{self.name}{way and f'_{way}'}.json", predictions)
            settings.write_json("samples", f"{self.name}_captions.json", caption_samples(records, answers[""]))
            settings.write_image("samples", f"{self.name}.png", sample_sheet(records, answers[""]))
        if not public:
            self.not_run[f"{self.name} accuracy"] = "the answers to these questions are not public"
            return {}
        if (guesses := blind_guesses(self, records, self.training_records)) is not None:
            answers["blind"] = guesses
        scores, self.draws = _accuracies(records, answers, full=True)
        return scores


def _accuracies(
    records: Sequence[Record], answers: Mapping[str, Answers], full: bool
) -> tuple[dict[str, float], dict[str, Draws]]:
    """Scores, and with `full` their draws: of images, each with all its questions, as those are not independent."""
    people = [enough_people(record.captions) for record in records]
    right = {
        way and f"{way}/": np.array([vqa_accuracy(found[r.id], of) for r, of in zip(records, people, strict=True)])
        for way, found in answers.items()
    }
    scores = accuracies_by_kind(records, right, lambda values, rows: sum(values[rows].tolist()) / len(rows))
    if not full:
        return scores, {}
    units = Units(record.image_key for record in records)
    parts = accuracies_by_kind(records, right, units.mean)
    return scores, bootstrap([records[i].id for i in units.first], Ratios(parts))


def accuracies_by_kind(
    records: Sequence[Record], right: Mapping[str, np.ndarray], mean: Callable[[np.ndarray, list[int]], T]
) -> dict[str, T]:
    """The accuracies of answers, and of those that were found in the way "" also for each kind: "number/accuracy".

    Args:
        right: the way in which answers were found, a prefix of the score -> how right (I,) they are.
        mean: of such values and numbers of records.
    """
    chosen = {"accuracy": list(range(len(records)))}
    for i, record in enumerate(records):
        if record.domain:
            chosen.setdefault(f"{record.domain}/accuracy", []).append(i)
    return {
        f"{way}{score}": mean(values, rows)
        for way, values in right.items()
        for score, rows in chosen.items()
        if not way or score == "accuracy"
    }


def blind_guesses(
    evaluation: Evaluation, records: Sequence[Record], training_records: Callable[[], Sequence[Record]] | None
) -> Answers | None:
    """The answers of somebody who does not look; None without training records, and with a note in
    `evaluation.not_run` where these cannot be read, as they need not lie beside the others, or have no answers.
    """
    if training_records is None:
        return None
    try:
        pairs = [(record.question, record.captions[0]) for record in training_records() if record.captions]
        return blind_answers({record.id: record.question for record in records}, pairs)
    except (DataError, ValueError) as error:
        evaluation.not_run[f"{evaluation.name} blind"] = str(error)
        return None

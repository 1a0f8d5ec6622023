"""Scores of answers to questions about images, and of labels of texts beside images."""

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from coca_lit.data.records import Record
from coca_lit.distributed import rank
from coca_lit.errors import DataError
from coca_lit.evals.base import Evaluation, Settings, kept_objective
from coca_lit.evals.samples import caption_samples, sample_sheet
from coca_lit.metrics.uncertainty import Draws, Ratios, Units, bootstrap
from coca_lit.models import DualEncoder
from coca_lit.projects.classification.classifier import Classifier
from coca_lit.projects.classification.labels import LabelScores, Parts, rows_by_accuracy
from coca_lit.projects.reasoning.accuracy import blind_answers, enough_people, vqa_accuracy
from coca_lit.projects.reasoning.written_answers import generate_answers

WRITTEN = ""  # the way of answers that the decoder writes; others are "classifier" and "blind"
Answers = dict[int | str, str]  # by question id


class VQAScores(Evaluation):
    """Accuracy of written answers, and of the answers of a classifier kept with the model, if there is one, and for
    each kind of answer. With `settings.full` also of the best guess of somebody who does not look ("blind").

    Predictions are written in the official results format, also for questions whose answers are not public.

    Args:
        records: questions, see `vqa_records`.
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
        are_public = all(record.captions for record in records)
        if not settings.full and (model.decoder is None or not are_public):
            return {}
        if model.decoder is None:
            self.not_run[f"{self.name} answers"] = "the model has no decoder, so it writes no answers"
            return {}
        size, workers = settings.batch_size, settings.workers
        answers = {WRITTEN: generate_answers(model, records, size, workers, settings.generate or {})}
        classifier = kept_objective(model, Classifier)
        if classifier is not None:
            likeliest = classifier.logits(model, records, size, workers).argmax(dim=1).tolist()
            chosen = [classifier.classes[number] for number in likeliest]
            answers["classifier"] = {record.id: answer for record, answer in zip(records, chosen, strict=True)}
        if not settings.full:
            return answer_accuracies(records, answers)
        if rank() == 0:
            self.write_predictions(records, answers, settings)
        if not are_public:
            self.not_run[f"{self.name} accuracy"] = "the answers to these questions are not public"
            return {}
        guesses = blind_guesses(self, records, self.training_records)
        if guesses is not None:
            answers["blind"] = guesses
        self.draws = answer_draws(records, answers)
        return answer_accuracies(records, answers)

    def write_predictions(self, records: Sequence[Record], answers: Mapping[str, Answers], settings: Settings) -> None:
        for way, answer_by_id in answers.items():
            rows = [{"question_id": id, "answer": answer} for id, answer in answer_by_id.items()]
            name = self.name if way == WRITTEN else f"{self.name}_{way}"
            settings.write_json("predictions", f"{name}.json", rows)
        settings.write_json("samples", f"{self.name}_captions.json", caption_samples(records, answers[WRITTEN]))
        settings.write_image("samples", f"{self.name}.png", sample_sheet(records, answers[WRITTEN]))


class StatementScores(LabelScores):
    """Accuracy of the labels of texts, see `LabelScores`; with `settings.full` also of the best guess of somebody who
    sees the text alone ("blind").

    Args:
        training_records: returns those of the training, from which the blind guesses come; None for no such score.
        together: of a record, what it shares with others of which it is asked whether all are right ("consistency");
            these are drawn together, in place of images. None for no such score.
    """

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        training_records: Callable[[], Sequence[Record]] | None = None,
        together: Callable[[Record], Hashable] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(name, records, every)
        self.training_records = training_records
        self.together = together

    def unit_of(self, record: Record) -> Hashable:
        return super().unit_of(record) if self.together is None else self.together(record)

    def parts(self, records: Sequence[Record], is_right: np.ndarray, units: Units, settings: Settings) -> Parts:
        parts = super().parts(records, is_right, units, settings)
        guesses = blind_guesses(self, records, self.training_records) if settings.full else None
        if guesses is not None:
            guessed_right = np.array([guesses[record.id] == record.captions[0] for record in records])
            parts["blind/accuracy"] = units.mean(guessed_right)
        if self.together is not None:
            right, asked = units.mean(is_right)
            parts["consistency"] = (right == asked).astype(np.float64), None
        return parts


def answer_accuracies(records: Sequence[Record], answers: Mapping[str, Answers]) -> dict[str, float]:
    """The accuracy of the answers that were found in each way, and of the written ones also for each kind.

    They are summed one after the other, as by the official evaluation.
    """
    scores: dict[str, float] = {}
    for score, (accuracies, rows) in _scored(records, answers).items():
        scores[score] = sum(accuracies[rows].tolist()) / len(rows)
    return scores


def answer_draws(records: Sequence[Record], answers: Mapping[str, Answers]) -> dict[str, Draws]:
    """Of the same scores: of images, each with all its questions, as those are not independent."""
    units = Units(record.image_key for record in records)
    parts = {score: units.mean(accuracies, rows) for score, (accuracies, rows) in _scored(records, answers).items()}
    return bootstrap([records[i].id for i in units.first], Ratios(parts))


def _scored(records: Sequence[Record], answers: Mapping[str, Answers]) -> dict[str, tuple[np.ndarray, list[int]]]:
    """For each score the accuracies (I,) of the answers, and the numbers of the records that it is a mean of."""
    people = [enough_people(record.captions) for record in records]
    scored: dict[str, tuple[np.ndarray, list[int]]] = {}
    for way, answer_by_id in answers.items():
        accuracies = np.array(
            [vqa_accuracy(answer_by_id[record.id], given) for record, given in zip(records, people, strict=True)]
        )
        if way == WRITTEN:
            scored |= {score: (accuracies, rows) for score, rows in rows_by_accuracy(records).items()}
        else:
            scored[f"{way}/accuracy"] = accuracies, list(range(len(records)))
    return scored


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

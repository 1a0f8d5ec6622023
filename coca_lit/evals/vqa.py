"""Scores of answers to questions about images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from coca_lit.data.records import Record
from coca_lit.distributed import rank
from coca_lit.errors import DataError
from coca_lit.evals.base import Evaluation
from coca_lit.evals.captions import checked_options
from coca_lit.evals.sample_data import caption_samples
from coca_lit.evals.samples import sample_sheet
from coca_lit.evals.vqa_answers import generate_answers
from coca_lit.metrics.vqa import blind_answers, vqa_scores
from coca_lit.models import DualEncoder
from coca_lit.training.answers import AnswerClassifier

Answers = dict[int | str, str]  # by question id


class VQAScores(Evaluation):
    """Accuracy of generated answers, and of those of an `AnswerClassifier` if one is trained. At the end also the
    accuracy for each kind of answer, and that of the best guess of somebody who does not look ("blind").

    Predictions are written in the official results format, also for questions whose answers are not public.

    Args:
        records: questions, see `coca_lit.data.datasets.vqa`.
        training_records: gives the training questions, from which the blind guesses come; None for no such score.
        generate: options of `CoCa.generate`; None for greedy answers.
    """

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        output_dir: str | Path,
        batch_size: int = 64,
        num_workers: int = 0,
        limit: int | None = None,
        quick: int = 256,
        every_n_epochs: int = 1,
        training_records: Callable[[], Sequence[Record]] | None = None,
        generate: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name, records, output_dir, batch_size, num_workers, limit, quick, every_n_epochs)
        self.training_records = training_records
        self.generate = checked_options(generate or {})
        self._classifier: AnswerClassifier | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        losses = pl_module.modules()
        self._classifier = next((loss for loss in losses if isinstance(loss, AnswerClassifier)), None)

    def scores(self, model: DualEncoder, records: Sequence[Record]) -> dict[str, float]:
        return self._accuracies(records, self._answers(model, records)) if records[0].captions else {}

    def all_scores(self, model: DualEncoder) -> dict[str, float]:
        if model.decoder is None:
            self.not_run[f"{self.name} answers"] = "the model has no decoder, so it writes no answers"
            return {}
        written = self._answers(model, self.records)
        if rank() == 0:
            for way, answers in written.items():
                predictions = [{"question_id": id, "answer": answer} for id, answer in answers.items()]
                self.write_json("predictions", f"{self.name}{way and f'_{way}'}.json", predictions)
            self.write_json("samples", f"{self.name}_captions.json", caption_samples(self.records, written[""]))
            sample_sheet(self.records, written[""]).save(self.output_dir / "samples" / f"{self.name}.png")
        if not all(record.captions for record in self.records):
            self.not_run[f"{self.name} accuracy"] = "the answers to these questions are not public"
            return {}
        return self._accuracies(self.records, written | self._blind())

    def _answers(self, model: DualEncoder, records: Sequence[Record]) -> dict[str, Answers]:
        """Answers by the way in which they were found: "" by generation, "classifier"."""
        if model.decoder is None:
            return {}
        written = {"": generate_answers(model, records, self.batch_size, self.num_workers, self.generate)}
        if self._classifier is not None:
            written["classifier"] = self._classifier.answer(model, records, self.batch_size, self.num_workers)
        return written

    def _blind(self) -> dict[str, Answers]:
        try:
            training = self.training_records() if self.training_records else None
        except DataError as error:  # the training split need not lie beside the one that is scored
            self.not_run[f"{self.name} blind"] = str(error)
            return {}
        return {} if training is None else {"blind": blind_answers(self.records, training)}

    @staticmethod
    def _accuracies(records: Sequence[Record], written: Mapping[str, Answers]) -> dict[str, float]:
        """Of generated answers also for each kind."""
        scores = {
            f"{way}/accuracy": vqa_scores(records, answers)["accuracy"] for way, answers in written.items() if way
        }
        return vqa_scores(records, written[""]) | scores if "" in written else scores

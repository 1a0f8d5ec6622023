"""Scores of a classifier that is trained beside the network: labels of images, or of texts beside images."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.distributed import rank
from coca_lit.errors import DataError
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.samples import caption_samples, sample_sheet
from coca_lit.metrics.classification import class_ranks
from coca_lit.metrics.uncertainty import Resampled, bootstrap, exact, ratios
from coca_lit.metrics.vqa import blind_answers, questions_by_score
from coca_lit.models import CLIP, DualEncoder

TOP5 = 10  # classes from which on five guesses say something


class LabelScores(Evaluation):
    """Accuracy of the labels that `settings.classifier` gives, for each kind too, and from ten classes on "top5". With
    `settings.full` also of the best guess of somebody who sees the text alone ("blind").

    Images are drawn for the intervals, each with all its texts. A class that ties with the right one counts as chosen.

    Args:
        records: each with its label as the first caption.
        training_records: returns those of the training, from which the blind guesses come; None for no such score.
        together: of a record, what it shares with others of which it is asked whether all are right ("consistency");
            these are drawn together, in place of images. None for no such score.
    """

    captioned = True
    classified = True
    generates = False
    score_names = ("accuracy",)
    final_score_names = None

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        training_records: Callable[[], Sequence[Record]] | None = None,
        together: Callable[[Record], Hashable] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(name, records, every)
        self.training_records, self.together = training_records, together

    def compared_texts(self, records: Sequence[Record]) -> Sequence[str]:
        """The texts, then the labels."""
        return [*(record.question for record in records), *(record.captions[0] for record in records)]

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        if settings.classifier is None or isinstance(model, CLIP):
            self.not_run[f"{self.name} labels"] = (
                "the model has no classifier: name the run or checkpoint that trained one"
            )
            return {}
        classes = list(settings.classifier.classes)
        logits = settings.classifier.logits(model, records, settings.batch_size, settings.workers)  # (I, N)
        chosen = {record.id: classes[i] for record, i in zip(records, logits.argmax(dim=1).tolist(), strict=True)}
        numbers = {name: i for i, name in enumerate(classes)}
        if unknown := [record for record in records if record.captions[0] not in numbers]:
            raise DataError(
                f"{len(unknown)} of {len(records)} records have a label that the classifier lacks, e.g. "
                f"{unknown[0].captions[0]!r:.80}: it was trained on {', '.join(classes[:5])}"
            )
        labels = Tensor([numbers[record.captions[0]] for record in records]).long()
        found = class_ranks(logits, labels).numpy()  # (I,)
        right = {"": found == 0}
        top5 = {"top5": found < 5} if len(classes) >= TOP5 else {}
        if settings.full:
            if self.training_records is not None:
                try:
                    training = [record for record in self.training_records() if record.captions]
                except DataError as error:  # the training split need not lie beside the one that is scored
                    self.not_run[f"{self.name} blind"] = str(error)
                else:
                    pairs = [(record.question, record.captions[0]) for record in training]
                    guesses = blind_answers({record.id: record.question for record in records}, pairs)
                    right["blind/"] = np.array([guesses[record.id] == record.captions[0] for record in records])
            if rank() == 0:
                rows = [{"id": id, "label": label} for id, label in chosen.items()]
                settings.write_json("predictions", f"{self.name}.json", rows)
                settings.write_json("samples", f"{self.name}_captions.json", caption_samples(records, chosen))
                settings.write_image("samples", f"{self.name}.png", sample_sheet(records, chosen))
        resampled, units = self._resampled(records, right, top5)
        if not settings.full:
            return exact(len(units), resampled)
        self.draws = bootstrap(units, resampled)
        return {score: draws.score for score, draws in self.draws.items()}

    def _resampled(
        self, records: Sequence[Record], right: dict[str, np.ndarray], top5: dict[str, np.ndarray]
    ) -> tuple[Resampled, list[Hashable]]:
        """The scores, and the units that are drawn, by the id of their first record."""
        first: dict[Hashable, int] = {}
        unit = np.array(
            [first.setdefault(self.together(r) if self.together else r.image, len(first)) for r in records]
        )  # (I,)
        ids: dict[int, Hashable] = {}
        for number, record in zip(unit.tolist(), records, strict=True):
            ids.setdefault(number, record.id)

        def part(values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """Sums and counts over the units (U,) of some rows."""
            counts = [np.bincount(unit[rows], weights=w, minlength=len(first)) for w in (values[rows], rows[rows])]
            return counts[0].astype(np.float64), counts[1].astype(np.float64)

        kinds = {i: record.domain for i, record in enumerate(records)}
        parts: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        for way, values in right.items():
            for score, numbers in questions_by_score(kinds, None if way else kinds).items():
                rows = np.zeros(len(records), dtype=bool)
                rows[numbers] = True
                parts[f"{way}{score}"] = part(values, rows)
        everything = np.ones(len(records), dtype=bool)
        parts |= {score: part(values, everything) for score, values in top5.items()}
        if self.together is not None:
            rights, asked = part(right[""], everything)
            parts["consistency"] = (rights == asked).astype(np.float64), None
        return ratios(parts), list(ids.values())

"""Scores of classification: zero-shot, by the names of the classes; and of a classifier that is trained beside the
network, by labels of images, or of texts beside images.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from coca_lit.data.datasets.classification import Classification
from coca_lit.data.records import Record
from coca_lit.distributed import rank
from coca_lit.errors import DataError
from coca_lit.evals.base import Evaluation, Settings, kept_with
from coca_lit.evals.inference import blind_log_likelihoods, embed_images, embed_texts, log_likelihoods
from coca_lit.evals.samples import caption_samples, confusion_samples, sample_sheet
from coca_lit.evals.vqa import accuracies_by_kind, blind_guesses
from coca_lit.metrics.classification import (
    ZeroShotAccuracy,
    class_features,
    class_ranks,
)
from coca_lit.metrics.uncertainty import Draws, Ratios, Units
from coca_lit.models import DualEncoder

TOP5 = 10  # labels from which on five guesses say something


class ZeroShotScores(Evaluation):
    """Top-1, top-5 and mean per-class recall of the classes nearest to the images, with all prompts of every class.

    Args:
        images: the classified images with class names and templates, see `coca_lit.data.datasets.classification`.
        likelihood: with `settings.full` also by the decoder: "likelihood/top1" by log p(prompt | image), averaged over
            the prompts of a class, and "pmi/top1" by log p(prompt | image) - log p(prompt), which does not favour names
            that are short or frequent. It reads every prompt beside every image.
    """

    generates = False
    score_names = ("top1", "top5", "mean_per_class_recall")

    def __init__(self, name: str, images: Classification, likelihood: bool = False, every: int = 1) -> None:
        super().__init__(name, images.records, every)
        self.labels = images.labels
        self.likelihood = likelihood
        self.prompts = [template.replace("{}", c) for c in images.class_names for template in images.templates]
        self.class_names = images.class_names

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        size = settings.batch_size
        workers = settings.workers
        count = len(self.class_names)
        prompts = embed_texts(model, self.prompts, size).unflatten(0, (count, -1))  # (C, P, E)
        classes = class_features(prompts)  # (C, E)
        ways = {"": embed_images(model, records, size, workers) @ classes.T}  # (I, C)
        if settings.full and self.likelihood:
            if model.decoder is None:
                self.not_run[f"{self.name} likelihood"] = "the model has no decoder to read the prompts with"
            else:
                numbers = range(len(self.prompts))
                read = torch.stack(log_likelihoods(model, records, self.prompts, lambda _: numbers, size, workers))
                blind = blind_log_likelihoods(model, self.prompts, size)
                for way, values in {"likelihood/": read, "pmi/": read - blind}.items():  # (I, C · P)
                    ways[way] = values.unflatten(1, (count, -1)).mean(dim=2)  # over the prompts of a class
        ways = {way: _told_apart(similarity.cpu(), self.class_names) for way, similarity in ways.items()}
        if settings.full and rank() == 0:
            chosen = ways[""].argmax(dim=1).tolist()
            classified = [(i, self.labels[records[i].id], chosen[i]) for i in range(len(records))]
            confused = confusion_samples(records, self.class_names, classified)
            settings.write_json("samples", f"{self.name}_confusion.json", confused)
        scores, self.draws = accuracies(ways, records, self.labels, settings.full)
        return scores

    def compared_texts(self, records: Sequence[Record]) -> Sequence[str]:
        """The prompts of all classes, of which one is chosen, then the classes of the images."""
        return [*self.prompts, *(self.class_names[self.labels[record.id]] for record in records)]


def _told_apart(similarity: Tensor, names: Sequence[str]) -> Tensor:
    """Similarities (I, C) in which the first class of a name is above the others, whose prompts are the same: one is
    chosen, as by OpenCLIP's `topk`. ImageNet has two such pairs.
    """
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        known = first.setdefault(name, i)
        if known != i:
            similarity[:, i] = similarity[:, known].nextafter(torch.tensor(-torch.inf))
    return similarity


def accuracies(
    ways: Mapping[str, Tensor], records: Sequence[Record], labels: Mapping[Hashable, int], full: bool
) -> tuple[dict[str, float], dict[str, Draws]]:
    """The scores of `ZeroShotAccuracy`, and with `full` their draws, for each of several similarities (I, C) of images
    and classes, by the prefix of its scores.
    """
    scores: dict[str, float] = {}
    draws: dict[str, Draws] = {}
    ids = [record.id for record in records]
    for way, similarity in ways.items():
        accuracy = ZeroShotAccuracy(resample=full, sync_on_compute=False)  # all is known on every rank
        accuracy.update(similarity.cpu(), torch.tensor([labels[id] for id in ids]), ids)
        scores |= {f"{way}{score}": value for score, value in accuracy.compute().items()}
        draws |= {f"{way}{score}": values for score, values in accuracy.draws.items()}
    return scores, draws


class LabelScores(Evaluation):
    """Accuracy of the labels that a classifier kept with the model gives, for each kind too, and from ten classes on
    "top5". With `settings.full` also of the best guess of somebody who sees the text alone ("blind").

    Images are drawn for the intervals, each with all its texts. A class that ties with the right one counts as chosen.

    Args:
        records: each with its label as the first caption.
        training_records: returns those of the training, from which the blind guesses come; None for no such score.
        together: of a record, what it shares with others of which it is asked whether all are right ("consistency");
            these are drawn together, in place of images. None for no such score.
    """

    captioned = True
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
        self.training_records = training_records
        self.together = together

    def compared_texts(self, records: Sequence[Record]) -> Sequence[str]:
        """The texts, then the labels."""
        return [*(record.question for record in records), *(record.captions[0] for record in records)]

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        classifier = kept_with(model, "classes", "logits")
        if classifier is None:
            self.not_run[f"{self.name} labels"] = (
                "the model has no classifier: name the run or checkpoint that trained one; one of a class of your own "
                "needs `register_objective` and imports=[…]"
            )
            return {}
        classes = list(classifier.classes)
        logits = classifier.logits(model, records, settings.batch_size, settings.workers)  # (I, N)
        chosen = {record.id: classes[i] for record, i in zip(records, logits.argmax(dim=1).tolist(), strict=True)}
        numbers = {name: i for i, name in enumerate(classes)}
        unknown = [record for record in records if record.captions[0] not in numbers]
        if unknown:
            raise DataError(
                f"{len(unknown)} of {len(records)} records have a label that the classifier lacks, e.g. "
                f"{unknown[0].captions[0]!r:.80}: it was trained on {', '.join(classes[:5])}"
            )
        labels = Tensor([numbers[record.captions[0]] for record in records]).long()
        found = class_ranks(logits, labels).numpy()  # (I,)
        right = {"": found == 0}
        if settings.full:
            guesses = blind_guesses(self, records, self.training_records)
            if guesses is not None:
                right["blind/"] = np.array([guesses[record.id] == record.captions[0] for record in records])
            if rank() == 0:
                rows = [{"id": id, "label": label} for id, label in chosen.items()]
                settings.write_json("predictions", f"{self.name}.json", rows)
                settings.write_json("samples", f"{self.name}_captions.json", caption_samples(records, chosen))
                settings.write_image("samples", f"{self.name}.png", sample_sheet(records, chosen))
        units = Units(self.together(record) if self.together else record.image_key for record in records)
        parts: dict[str, tuple[np.ndarray, np.ndarray | None]] = {**accuracies_by_kind(records, right, units.mean)}
        if len(classes) >= TOP5:
            parts["top5"] = units.mean(found < 5)
        if self.together is not None:
            rights, asked = units.mean(right[""])
            parts["consistency"] = (rights == asked).astype(np.float64), None
        return self.resample([records[i].id for i in units.first], Ratios(parts), settings)

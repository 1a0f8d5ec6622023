"""What all evaluations share.

An evaluation with your own metric is a class with one method, or a function with the same arguments:

    class CaptionLength(Evaluation):
        def scores(self, model, records, settings):
            options = settings.generate or {}
            captions = caption_images(model, records, settings.batch_size, settings.workers, options)
            return {"words": fmean(len(caption.split()) for caption in captions.values())}
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from coca_lit.data.records import Record
from coca_lit.data.sources import ImageSource
from coca_lit.distributed import print_rank_zero
from coca_lit.errors import ConfigError, DataError, check_number
from coca_lit.files import atomic_write
from coca_lit.metrics.uncertainty import Conditions, Draws, Resampled, bootstrap, digest, exact
from coca_lit.models import DualEncoder
from coca_lit.models.generation.options import OPTIONS, check_shared, complete

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What the evaluations of a run share: the config node `scoring`.

    Args:
        output_dir: the run folder.
        split: the split that is scored, of data sets that have several. For the readers of the records.
        images: score at most this many images per evaluation; None for all.
        batch_size: images or texts at a time in every pass through the model.
        workers: processes that load images.
        clip_score_model: checkpoint that judges CLIPScore; None for the scored model, which is then its own judge.
        generate: options of `CoCa.generate`, e.g. {"strategy": "beam", "num_beams": 4}; None for greedy captions.
            A prompt is of captions only: an answer begins with its question.
        rerank: decoder re-ranking in retrieval: how many images are scored by the decoder for each text; 0 for none.
            The decoder's share of the score is `evals.NAME.rerank_weight`, 0.5 by default.
        attention: for how many images the report shows where each word of the caption comes from, as far as a project
            says that.
        full: also compute what takes too long during training (SPICE, intervals, …), and write samples for the report.

    Raises:
        ValueError: a number out of range, or options of `CoCa.generate` that it does not take.
    """

    output_dir: str | Path
    split: str = "val"
    images: int | None = None
    batch_size: int = 64
    workers: int = 0
    clip_score_model: str | None = None
    generate: Mapping[str, Any] | None = None
    rerank: int = 0
    attention: int = 0
    full: bool = True

    def __post_init__(self) -> None:
        for name, lowest in (("batch_size", 1), ("workers", 0), ("rerank", 0), ("attention", 0), ("images", 1)):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, whole=True, at_least=lowest)
        check_shared(self.generate or {})

    def write_json(self, folder: str, name: str, content: Any) -> None:
        """Writes a file into a folder of the run folder, see `write`."""
        self.write(folder, name, json.dumps(content, indent=0).encode())

    def write_image(self, folder: str, name: str, image: Image.Image) -> None:
        """Writes a PNG into a folder of the run folder, see `write`."""
        file = BytesIO()
        image.save(file, "PNG")
        self.write(folder, name, file.getvalue())

    def write(self, folder: str, name: str, content: bytes) -> None:
        """Writes a file into a folder of the run folder. On a full disk that is a warning: the scores count more."""
        try:
            atomic_write(Path(self.output_dir, folder, name), content)
        except DataError as error:
            log.warning("%s; it is left out", error)


class NotRunError(Exception):
    """Why scores of this model cannot be computed. An evaluation whose `scores` raises it has none, and `not_run.json`
    holds the reason. All ranks must raise it.
    """


def kept_objective(model: DualEncoder, kind: type[T]) -> T | None:
    """The first objective of a class, or of a subclass, that is kept with a model; None if it keeps none."""
    objectives: Mapping[str, Any] = getattr(model, "objectives", {})  # which a CLIP has not
    return next((objective for objective in objectives.values() if isinstance(objective, kind)), None)


def required_objective(model: DualEncoder, kind: type[T]) -> T:
    """The same.

    Raises:
        NotRunError: the model keeps none.
    """
    objective = kept_objective(model, kind)
    if objective is None:
        raise NotRunError(
            f"the model has no {kind.__name__}: name the run or checkpoint that trained one; a class of your own needs "
            "`register_objective` and imports=[…]"
        )
    return objective


class Evaluation:
    """Something to score a model on. A subclass has one method, `scores`.

    Args:
        name: first part of the names of its scores, as in `mscoco/CIDEr`.
        records: the images with all their captions.
        every: during training it takes part in every N-th scoring; 0 for the end only.

    Raises:
        DataError: there are no records, two have the same id, or one lacks the captions that a `captioned` evaluation
            needs.

    Attributes:
        captioned: whether every record needs a caption.
        generates: whether scores may depend on captions that the model writes; true unless a class says otherwise.
        score_names: names of the scores, if they are known beforehand: a misspelt name is then found before training.
        final_score_names: names of the further scores with `settings.full`; None if they are not known beforehand.
        kinds_in_training: whether it scores kinds of records apart, as KIND/SCORE, not only with `settings.full`.
        not_run: score -> why the last `evaluate` could not compute it; `scores` notes it.
        draws: score -> its values for resampled images, from which intervals come, of the last `evaluate`; `scores`
            notes what `coca_lit.metrics.uncertainty.bootstrap` returns.
        conditions: score -> what it depends on besides the model, of the last `evaluate` with `settings.full`.
    """

    captioned = False
    generates = True
    score_names: Sequence[str] = ()
    final_score_names: Sequence[str] | None = ()
    kinds_in_training = True

    def __init__(self, name: str, records: Sequence[Record], every: int = 1) -> None:
        check_number("every", every, whole=True, at_least=0)
        if not len(records):
            raise DataError(f"the evaluation '{name}' got no records: check what returns them")
        shared = [id for id, count in Counter(record.id for record in records).items() if count > 1]
        if shared:
            raise DataError(f"two records of '{name}' have the id {shared[0]!r}: give each its own")
        if self.captioned and (bare := [record.id for record in records if not record.captions]):
            raise DataError(
                f"{len(bare)} of {len(records)} records of '{name}' have no caption, e.g. {bare[0]!r}: leave them out"
            )
        self.name = name
        self.records = records
        self.every = every
        self.not_run: dict[str, str] = {}
        self.draws: dict[str, Draws] = {}
        self.conditions: dict[str, Conditions] = {}

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        """Scores of the model on the records, the same on every rank.

        Raises:
            NotRunError: they cannot be computed of this model.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method scores(model, records, settings)")

    def evaluate(self, model: DualEncoder, settings: Settings, limit: int | None = None) -> dict[str, float]:
        """The scores, named `name/score`, on at most `settings.images` records and at most the first `limit`; see
        `name_of` for the name.
        """
        records = self.records[: settings.images][:limit]
        if settings.full:
            images = len({record.image_key for record in records})
            print_rank_zero(f"scoring {images} images of {self.name} ({type(self).__name__})")
        self.not_run = {}
        self.draws = {}
        try:
            scores = self.scores(model, records, settings)
        except NotRunError as reason:
            self.not_run[f"{self.name} ({type(self).__name__})"] = str(reason)
            scores = {}
        name = self.name_of(settings, limit)
        self.draws = {f"{name}/{score}": draws for score, draws in self.draws.items()}
        known = self._conditions(scores, model, records, settings) if settings.full else {}
        self.conditions = {f"{name}/{score}": conditions for score, conditions in known.items()}
        return {f"{name}/{score}": float(value) for score, value in scores.items()}  # of a tensor or NumPy number, too

    def resample(self, units: Sequence[Hashable], scores: Resampled, settings: Settings) -> dict[str, float]:
        """The scores; with `settings.full` their draws are noted."""
        if settings.full:
            self.draws |= bootstrap(units, scores)
        return exact(len(units), scores)

    def depends_on(self, score: str, settings: Settings) -> dict[str, Any]:
        """The settings that a score depends on, by name; here the options of `CoCa.generate` that are not the defaults,
        if the evaluation `generates`.
        """
        options = vars(complete(settings.generate or {})) if self.generates else {}
        return {f"generate.{key}": value for key, value in options.items() if value != OPTIONS[key].default}

    def compared_texts(self, records: Sequence[Record]) -> Sequence[str]:
        """What the images are compared with: here all captions."""
        return [caption for record in records for caption in record.captions]

    def _conditions(
        self, scores: Iterable[str], model: DualEncoder, records: Sequence[Record], settings: Settings
    ) -> dict[str, Conditions]:
        """Of each score, those of a domain included, such as "in-domain/CIDEr"."""
        of_sources: dict[str, set[Any]] = {}
        for record in records:
            if isinstance(record.image, ImageSource):
                for name, value in record.image.conditions(model).items():
                    of_sources.setdefault(name, set()).add(value)
        of_images = {name: "/".join(map(str, sorted(values))) for name, values in of_sources.items()}
        groups = {"": records}
        for domain in dict.fromkeys(record.domain for record in records if record.domain):
            groups[domain] = [record for record in records if record.domain == domain]
        known: dict[str, Conditions] = {}
        for domain, members in groups.items():
            texts = self.compared_texts(members)
            ids = digest(record.id for record in members)
            images = len({record.image_key for record in members})  # of several questions about an image one
            known[domain] = Conditions(settings.split, images, ids, len(texts), digest(texts), {})
        of_all = known[""]
        return {
            score: known.get(score.rpartition("/")[0], of_all)._replace(
                settings=self.depends_on(score, settings) | of_images
            )
            for score in scores
        }

    def name_of(self, settings: Settings, limit: int | None = None) -> str:
        """`name`, or `mscoco_256` if `limit` leaves records out, so that no curve jumps from some images to others."""
        left_out = limit is not None and limit < len(self.records[: settings.images])
        return f"{self.name}_{limit}" if left_out else self.name


class FunctionEvaluation(Evaluation):
    """An evaluation whose scores come from a function.

    Args:
        function: called as `function(model, records, settings)`, returns scores by name, the same on every rank.
    """

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        function: Callable[[DualEncoder, Sequence[Record], Settings], dict[str, float]],
        every: int = 1,
    ) -> None:
        super().__init__(name, records, every)
        self.function = function

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        scores: Any = self.function(model, records, settings)
        if not isinstance(scores, Mapping):
            raise ConfigError(f"evals.{self.name} must return {{score: value}}, got a {type(scores).__name__}")
        return dict(scores)

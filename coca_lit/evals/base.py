"""What all evaluations share.

An evaluation with your own metric is a class with one method, or a function with the same arguments:

    class CaptionLength(Evaluation):
        def scores(self, model, records, settings):
            captions = caption_images(model, records, settings.batch_size, settings.workers, settings.generate)
            return {"words": fmean(len(caption.split()) for caption in captions.values())}
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from coca_lit.data.records import Record
from coca_lit.distributed import print_rank_zero
from coca_lit.errors import DataError, check_number, suggest
from coca_lit.files import atomic_write
from coca_lit.metrics.uncertainty import Draws
from coca_lit.models import CoCa, DualEncoder
from coca_lit.models.generation.options import OPTIONS, complete

log = logging.getLogger(__name__)


class Answerer(Protocol):
    """Another way to answer questions than writing the answer: a classifier that was trained beside the network."""

    def __call__(
        self, net: CoCa, records: Sequence[Record], batch_size: int = 64, num_workers: int = 0
    ) -> dict[int | str, str]:
        """An answer to each question, by question id; every rank gets all of them."""


@dataclass(frozen=True)
class Settings:
    """What the evaluations of a run share: the config node `scoring`.

    Args:
        output_dir: the run folder.
        split: the split that is scored, of data sets that have several. For the readers of the records.
        images: score at most this many images per evaluation; None for all.
        batch_size: of all passes through the model.
        workers: processes that load images.
        clip_score_model: checkpoint that judges CLIPScore; None for the scored model, which is then its own judge.
        generate: options of `CoCa.generate`, e.g. {"strategy": "beam", "num_beams": 4}; None for greedy captions.
            A prompt is of captions only: an answer begins with its question.
        rerank: decoder re-ranking in retrieval: how many images are scored by the decoder for each text; 0 for none.
            The decoder's share of the score is `evals.NAME.rerank_weight`, 0.5 by default.
        attention: for how many images the report shows where the model looked as it wrote each word.
        answerer: of the model that is scored, if it has one; during training the callback knows.

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
    answerer: Answerer | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, lowest in (("batch_size", 1), ("workers", 0), ("rerank", 0), ("attention", 0), ("images", 1)):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, whole=True, at_least=lowest)
        known = [name for name, option in OPTIONS.items() if option.key and name != "num_captions"]
        for name in self.generate or {}:
            if name not in known:
                raise ValueError(f"generate has no option '{name}' for an evaluation{suggest(name, known)}")
        try:
            complete(self.generate or {})
        except ValueError as error:
            raise ValueError(f"generate: {error}") from error

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


class Evaluation:
    """Something to score a model on.

    Args:
        name: first part of the names of its scores, as in `mscoco/CIDEr`.
        records: the images with all their captions.
        every: during training it takes part in every N-th scoring; 0 for the end only.

    Raises:
        DataError: there are no records, or one lacks the captions that a `captioned` evaluation needs.

    Attributes:
        captioned: whether every record needs a caption.
        score_names: names of the scores, if they are known beforehand: a misspelt name is then found before training.
        final_score_names: names of the scores that only `all_scores` adds; None if they are not known beforehand.
        not_run: score -> why the last `evaluate` could not compute it.
        draws: score -> its values for resampled images, of the last `evaluate`. Intervals come from them.
    """

    captioned = False
    score_names: Sequence[str] = ()
    final_score_names: Sequence[str] | None = None

    def __init__(self, name: str, records: Sequence[Record], every: int = 1) -> None:
        check_number("every", every, whole=True, at_least=0)
        if not len(records):
            raise DataError(f"the evaluation '{name}' needs one or more records, but got none: check what returns them")
        if self.captioned and (bare := [record.id for record in records if not record.captions]):
            raise DataError(
                f"each record of the evaluation '{name}' needs a caption, but {len(bare)} of {len(records)} have none, "
                f"e.g. {bare[0]!r}: leave them out"
            )
        self.name, self.records, self.every = name, records, every
        self.not_run: dict[str, str] = {}
        self.draws: dict[str, Draws] = {}

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        """Scores of the model on the records, the same on every rank."""
        raise NotImplementedError(f"{type(self).__name__} needs a method scores(model, records, settings)")

    def all_scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        """As `scores`, with everything that takes too long during training. May note in `not_run` what is missing, and
        in `draws` what `coca_lit.metrics.uncertainty.bootstrap` returns for the scores.
        """
        return self.scores(model, records, settings)

    def evaluate(self, model: DualEncoder, settings: Settings) -> dict[str, float]:
        """All scores, on all records (at most `settings.images`), named `name/score`."""
        records = self.records[: settings.images]
        print_rank_zero(f"scoring {len(records)} images of {self.name} ({type(self).__name__})")
        self.not_run, self.draws = {}, {}
        scores = self.all_scores(model, records, settings)
        self.draws = {f"{self.name}/{score}": draws for score, draws in self.draws.items()}
        return {f"{self.name}/{score}": value for score, value in scores.items()}

    def quick_name(self, settings: Settings, quick: int) -> str:
        """`name` if all records are scored during training, else with their number: `mscoco_256`. So no curve jumps
        from one set of images to another.
        """
        count = len(self.records[: settings.images])
        return self.name if quick >= count else f"{self.name}_{quick}"

    def evaluate_quickly(self, model: DualEncoder, settings: Settings, quick: int) -> dict[str, float]:
        """The scores of training on the first `quick` records, named `quick_name/score`."""
        name, records = self.quick_name(settings, quick), self.records[: settings.images][:quick]
        self.not_run = {}
        return {f"{name}/{score}": value for score, value in self.scores(model, records, settings).items()}


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
        return self.function(model, records, settings)

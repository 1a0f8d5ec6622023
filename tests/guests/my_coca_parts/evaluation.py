"""An evaluation with a user's metric, and one of a user's objective that is kept with the model."""

from collections.abc import Sequence
from statistics import fmean

from coca_lit.data.records import Record
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import caption_images, embed_images
from coca_lit.models import CoCa


class CaptionLength(Evaluation):
    """Words per generated caption."""

    def scores(self, model: CoCa, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        captions = caption_images(model, records, settings.batch_size, settings.workers, settings.generate or {})
        return {"words": fmean(len(caption.split()) for caption in captions.values())}


class GuessedBrightness(Evaluation):
    """The mean brightness that `Brightness` guesses."""

    def scores(self, model: CoCa, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        features = embed_images(model, records, settings.batch_size, settings.workers)
        guess = model.objectives["brightness"].guess
        return {"brightness": guess(features.to(guess.weight.device)).mean().item()}

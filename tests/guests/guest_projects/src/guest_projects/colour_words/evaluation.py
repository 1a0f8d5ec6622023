"""Which captions name a colour that a reference names."""

from collections.abc import Sequence
from statistics import fmean

from coca_lit.data.records import Record
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import caption_images
from coca_lit.models import CoCa

COLOURS = frozenset({"red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan"})


class NamedColours(Evaluation):
    def scores(self, model: CoCa, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        captions = caption_images(model, records, settings.batch_size, settings.workers, settings.generate or {})
        right = []
        for record in records:
            named = COLOURS.intersection(captions[record.id].split())
            true = COLOURS.intersection(" ".join(record.captions).split())
            right.append(not named.isdisjoint(true))
        return {"named_colours": fmean(right)}

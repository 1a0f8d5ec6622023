"""An evaluation: scores of a model on records, with intervals."""

from collections.abc import Sequence

import torch

from coca_lit.data.records import Record
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import embed_pairs
from coca_lit.metrics.uncertainty import Ratios, bootstrap
from coca_lit.models import DualEncoder


class PairCosines(Evaluation):
    """The mean cosine of an image and its captions, "nearness"."""

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        images, texts, image_of_text = embed_pairs(model, records, settings.batch_size, settings.workers)
        cosines = (images[image_of_text] * texts).sum(dim=1)  # (T,)
        counts = torch.bincount(torch.as_tensor(image_of_text), minlength=len(records))
        sums = torch.zeros(len(records)).index_add(0, torch.as_tensor(image_of_text), cosines.float().cpu())
        self.draws = bootstrap(  # the 95 % interval; a score without draws has none
            [record.id for record in records], Ratios({"nearness": ((sums / counts).double().numpy(), None)})
        )
        return {"nearness": self.draws["nearness"].score}

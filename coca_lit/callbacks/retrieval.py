"""Retrieval scores, with samples for the report."""

from collections.abc import Sequence

from coca_lit.callbacks.evaluation import Evaluation
from coca_lit.data.records import Record
from coca_lit.distributed import rank
from coca_lit.evals.collect import embed_pairs
from coca_lit.evals.retrieval import retrieval_scores
from coca_lit.evals.sample_data import retrieval_samples
from coca_lit.models import DualEncoder


class RetrievalScores(Evaluation):
    """Recall@1/5/10 in both directions, with all captions of every image. At the end also samples for the report."""

    def scores(self, model: DualEncoder, records: Sequence[Record]) -> dict[str, float]:
        return retrieval_scores(*embed_pairs(model, records, self.batch_size, self.num_workers))

    def all_scores(self, model: DualEncoder) -> dict[str, float]:
        images, texts, image_of_text = embed_pairs(model, self.records, self.batch_size, self.num_workers)
        if rank() == 0:
            samples = retrieval_samples(self.records, images, texts, image_of_text)
            self.write_json("samples", f"{self.name}_retrieval.json", samples)
        return retrieval_scores(images, texts, image_of_text)

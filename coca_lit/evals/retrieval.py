"""Retrieval scores, with samples for the report."""

from collections.abc import Sequence
from pathlib import Path

from coca_lit.data.records import Record
from coca_lit.distributed import rank
from coca_lit.evals.base import Evaluation
from coca_lit.evals.inference import embed_pairs
from coca_lit.evals.reranking import check_second_look, decoder_rerank
from coca_lit.evals.sample_data import retrieval_samples
from coca_lit.metrics.retrieval import recall_at_k, retrieval_scores
from coca_lit.models import DualEncoder


class RetrievalScores(Evaluation):
    """Recall@1/5/10 in both directions, with all captions of every image. At the end also samples for the report, and
    if asked for, recall after the decoder's second look: `mscoco/reranked_t2i_recall@1`.

    Args:
        rerank: so many images are read with each text again, see `coca_lit.evals.reranking`; 0 for none.
        rerank_weight: of what the decoder says, between 0 and 1.
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
        rerank: int = 0,
        rerank_weight: float = 0.5,
    ) -> None:
        super().__init__(name, records, output_dir, batch_size, num_workers, limit, quick, every_n_epochs)
        if rerank:  # said now, not after the training
            check_second_look(rerank, rerank_weight)
        self.rerank, self.rerank_weight = rerank, rerank_weight

    def scores(self, model: DualEncoder, records: Sequence[Record]) -> dict[str, float]:
        return retrieval_scores(*embed_pairs(model, records, self.batch_size, self.num_workers))

    def all_scores(self, model: DualEncoder) -> dict[str, float]:
        images, texts, image_of_text = embed_pairs(model, self.records, self.batch_size, self.num_workers)
        if rank() == 0:
            samples = retrieval_samples(self.records, images, texts, image_of_text)
            self.write_json("samples", f"{self.name}_retrieval.json", samples)
        scores = retrieval_scores(images, texts, image_of_text)
        if not self.rerank:
            return scores
        if model.decoder is None:
            self.not_run[f"{self.name} reranked recall"] = "the model has no decoder to read texts beside images with"
            return scores
        options = (self.rerank, self.rerank_weight, self.batch_size, self.num_workers)
        recalls = recall_at_k(decoder_rerank(model, self.records, images, texts, *options), image_of_text)
        return scores | {f"reranked_{name}": value for name, value in recalls.items()}

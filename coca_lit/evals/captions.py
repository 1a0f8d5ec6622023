"""Scores of generated captions, which are written to files before they are scored."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coca_lit.data.records import Record
from coca_lit.distributed import broadcast_object, rank
from coca_lit.errors import DataError, suggest
from coca_lit.evals.attention import attention_samples
from coca_lit.evals.base import Evaluation
from coca_lit.evals.inference import caption_images, embed_pairs, embed_texts
from coca_lit.evals.sample_data import caption_samples
from coca_lit.evals.samples import sample_sheet
from coca_lit.metrics.caption_table import caption_table, exact_match
from coca_lit.metrics.captions import caption_scores
from coca_lit.metrics.clipscore import PROMPT, clip_scores
from coca_lit.metrics.diversity import novel_share
from coca_lit.metrics.java.meteor import warm_up
from coca_lit.models import CoCa, DualEncoder
from coca_lit.models.generation.options import OPTIONS
from coca_lit.weights.load import load_dual_encoder


class CaptionScores(Evaluation):
    """Captions against their references: BLEU, METEOR, ROUGE-L, CIDEr, exact matches.

    At the end also SPICE (if its jars are there), the scores of each nocaps domain, statistics of the captions, the
    share of novel ones, and CLIPScore and RefCLIPScore. Predictions are written before they are scored.

    Args:
        clip_score_model: checkpoint that judges CLIPScore; None for the scored model, a partial judge of its own
            captions.
        training_captions: gives the captions of the training split; a caption that is not among them is novel.
        generate: options of `CoCa.generate`, e.g. {"strategy": "beam", "num_beams": 4}; None for greedy captions.
        attention: for how many images the report shows where the model looked when it wrote each word.
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
        clip_score_model: str | None = None,
        training_captions: Callable[[], Sequence[str]] | None = None,
        generate: Mapping[str, Any] | None = None,
        attention: int = 0,
    ) -> None:
        super().__init__(name, records, output_dir, batch_size, num_workers, limit, quick, every_n_epochs)
        self.clip_score_model = clip_score_model
        self.training_captions = training_captions
        self.generate = checked_options(generate or {})
        self.attention = attention

    def scores(self, model: DualEncoder, records: Sequence[Record]) -> dict[str, float]:
        if model.decoder is None:
            return {}
        captions = self._captions(model, records)
        scores: dict[str, float] = {}
        if rank() == 0:
            scores = caption_scores({r.id: r.captions for r in records}, captions)
            scores["exact_match"] = exact_match({r.id: r.captions for r in records}, captions)
        return broadcast_object(scores)

    def all_scores(self, model: DualEncoder) -> dict[str, float]:
        if model.decoder is None:
            self.not_run[f"{self.name} captions"] = "the model has no decoder, so it writes no captions"
            return {}
        captions = self._captions(model, self.records)
        if rank() == 0 and self.attention:
            samples = attention_samples(model, self.records, self.attention, self.generate)
            self.write_json("samples", f"{self.name}_attention.json", samples)
        clip_scores = self._clip_scores(model, list(captions.values()))
        table: tuple[dict[str, float], dict[str, str]] = ({}, {})
        if rank() == 0:
            references = {r.id: r.captions for r in self.records}
            table = caption_table(references, captions, {r.id: r.domain for r in self.records})
        scores, not_run = broadcast_object(table)
        self.not_run |= {f"{self.name} {score}": reason for score, reason in not_run.items()}
        return scores | self._novel(list(captions.values())) | clip_scores

    def _novel(self, captions: Sequence[str]) -> dict[str, float]:
        try:
            return {"novel": novel_share(captions, self.training_captions())} if self.training_captions else {}
        except DataError as error:  # the training split need not lie beside the one that is scored
            self.not_run[f"{self.name} novel"] = str(error)
            return {}

    def _clip_scores(self, model: DualEncoder, captions: Sequence[str]) -> dict[str, float]:
        judge = model if self.clip_score_model is None else load_dual_encoder(self.clip_score_model).to(model.device)
        prompt = PROMPT if judge.tokenizer.spec == "clip" else ""  # a closed vocabulary lacks its words
        images, references, image_of_reference = embed_pairs(
            judge, self.records, self.batch_size, self.num_workers, prompt
        )
        written = embed_texts(judge, [prompt + caption for caption in captions], self.batch_size)
        return clip_scores(images, written, references, image_of_reference)

    def _captions(self, model: CoCa, records: Sequence[Record]) -> dict[int | str, str]:
        """Writes captions, and writes them down: the predictions in the COCO results format and a sheet of samples."""
        if rank() == 0:
            warm_up()  # METEOR loads for seconds; let it do so while the model writes
        captions = caption_images(model, records, self.batch_size, self.num_workers, self.generate)
        if rank() == 0:
            predictions = [{"image_id": id, "caption": caption} for id, caption in captions.items()]
            self.write_json("predictions", f"{self.name}.json", predictions)
            self.write_json("samples", f"{self.name}_captions.json", caption_samples(records, captions))
            sample_sheet(records, captions).save(self.output_dir / "samples" / f"{self.name}.png")
        return captions


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if `CoCa.generate` has them all and writes one caption for each image with them."""
    known = [name for name, option in OPTIONS.items() if option.key and name != "num_captions"]
    for name in options:
        if name not in known:
            raise ValueError(f"generate has no option '{name}' for an evaluation{suggest(name, known)}")
    return dict(options)

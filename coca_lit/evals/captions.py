"""Scores of generated captions, which are written to files before they are scored."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.distributed import print_rank_zero, rank, world_size
from coca_lit.errors import DataError
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import caption_images, embed_pairs, embed_texts
from coca_lit.evals.samples import attention_samples, caption_samples, sample_sheet, worst_captions
from coca_lit.metrics.captions import CaptionMetric
from coca_lit.metrics.clipscore import PROMPT, clip_scores_of_images
from coca_lit.metrics.diversity import are_novel
from coca_lit.metrics.java.meteor import warm_up
from coca_lit.metrics.java.runtime import JavaError
from coca_lit.metrics.uncertainty import bootstrap, ratios
from coca_lit.models import CoCa, DualEncoder
from coca_lit.progress import ProgressBar

Captions = dict[int | str, str]  # by image id
# A score of one's own: score -> a number for each image, in the order of the records, and a second one. The score is
# the sum of the first over the sum of the second, and the mean over the images if that is None.
Measure = Callable[[Sequence[Record], Captions], Mapping[str, tuple[np.ndarray, np.ndarray | None]]]


class CaptionScores(Evaluation):
    """Captions against their references: BLEU, METEOR, ROUGE-L, CIDEr, exact matches.

    At the end also SPICE (if its jars are there), the scores of each nocaps domain, statistics of the captions, the
    share of novel ones, CLIPScore and RefCLIPScore.

    Args:
        training_captions: returns the captions of the training split; a caption that is not among them is novel.
        measures: further scores, called with the records and the captions at the end, see `Measure`.
    """

    captioned = True
    score_names = (*(f"Bleu_{n}" for n in range(1, 5)), "METEOR", "ROUGE_L", "CIDEr", "exact_match")
    final_score_names: Sequence[str] | None = (
        *("SPICE", *(f"SPICE_{part}" for part in ("object", "attribute", "relation", "color", "count", "size"))),
        *("mean_length", "vocabulary", "distinct_1", "distinct_2", "novel", "CLIPScore", "RefCLIPScore"),
    )

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        training_captions: Callable[[], Sequence[str]] | None = None,
        measures: Mapping[str, Measure] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(name, records, every)
        self.training_captions, self.measures = training_captions, dict(measures or {})
        if self.measures:
            self.final_score_names = None

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        if model.decoder is None:
            return {}
        metric = CaptionMetric()
        scores = self._compare(metric, self._write(model, records, settings), records)
        for score, reason in metric.not_run.items():
            print_rank_zero(f"{self.name} {score} not run: {reason}")
        return scores

    def all_scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        if model.decoder is None:
            self.not_run[f"{self.name} captions"] = "the model has no decoder, so it writes no captions"
            return {}
        captions = self._write(model, records, settings)
        if rank() == 0:
            settings.write_json("samples", f"{self.name}_worst.json", worst_captions(records, captions))
        if rank() == 0 and settings.attention:
            samples = attention_samples(model, records, settings.attention, settings.generate or {})
            settings.write_json("samples", f"{self.name}_attention.json", samples)
        of_images = _clip_scores(model, records, list(captions.values()), settings)
        judged = {name: values.mean().item() for name, values in of_images.items()}
        with ProgressBar("SPICE") as bar:
            metric = CaptionMetric(table=True, progress=bar.reach)
            scores = self._compare(metric, captions, records)
        if self.training_captions is not None:
            try:
                novel = are_novel(list(captions.values()), self.training_captions())
            except DataError as error:  # the training split need not lie beside the one that is scored
                self.not_run[f"{self.name} novel"] = str(error)
            else:
                scores["novel"] = sum(novel) / max(len(novel), 1)
                of_images["novel"] = torch.tensor(novel)
        means = ratios({name: (values.double().numpy(), None) for name, values in of_images.items()})
        measured = bootstrap(list(captions), ratios(self._measured(records, captions)))
        self.draws = metric.draws | bootstrap(list(captions), means) | measured
        return scores | judged | {name: draws.score for name, draws in measured.items()}

    def _measured(
        self, records: Sequence[Record], captions: Captions
    ) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        """What the measures find. A score whose data cannot be read, or that is a share of nothing, is not run."""
        parts: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        for measure, function in self.measures.items():
            try:
                found = function(records, captions)
            except DataError as error:
                self.not_run[f"{self.name} {measure}"] = str(error)
                continue
            for score, (over, under) in found.items():
                if under is not None and not under.any():
                    self.not_run[f"{self.name} {score}"] = "the captions have nothing of the kind"
                else:
                    parts[score] = over, under
        return parts

    def _write(self, model: CoCa, records: Sequence[Record], settings: Settings) -> Captions:
        """Generates captions and writes files: the predictions in the COCO results format, and samples."""
        if rank() == 0:
            with suppress(OSError):  # without Java; `_compare` says so
                warm_up()  # METEOR takes seconds to load; let it do so while the model generates
        captions = caption_images(model, records, settings.batch_size, settings.workers, settings.generate or {})
        if rank() == 0:
            predictions = [{"image_id": id, "caption": caption} for id, caption in captions.items()]
            settings.write_json("predictions", f"{self.name}.json", predictions)
            settings.write_json("samples", f"{self.name}_captions.json", caption_samples(records, captions))
            settings.write_image("samples", f"{self.name}.png", sample_sheet(records, captions))
        return captions

    def _compare(self, metric: CaptionMetric, captions: Captions, records: Sequence[Record]) -> dict[str, float]:
        """The scores that can be computed, on every rank; `not_run` says which cannot, and why."""
        own = records[rank() :: world_size()]
        ids = [record.id for record in own]
        references, domains = [record.captions for record in own], [record.domain for record in own]
        metric.update(ids, [captions[id] for id in ids], references, domains)
        try:
            scores, missing = metric.compute(), metric.not_run
        except (JavaError, FileNotFoundError) as error:  # of the tokenizer, which all scores need
            scores, missing = {}, {"captions": str(error)}
        self.not_run |= {f"{self.name} {score}": reason for score, reason in missing.items()}
        return scores


def _clip_scores(
    model: DualEncoder, records: Sequence[Record], captions: Sequence[str], settings: Settings
) -> dict[str, Tensor]:
    """CLIPScore and RefCLIPScore (I,) of the images."""
    judge = model
    if settings.clip_score_model is not None:
        from coca_lit.weights.load import load_dual_encoder

        judge = load_dual_encoder(settings.clip_score_model).to(model.device)
    prompt = PROMPT if judge.tokenizer.unk_id is None else ""  # a closed vocabulary lacks its words
    images, references, image_of_reference = embed_pairs(judge, records, settings.batch_size, settings.workers, prompt)
    written = embed_texts(judge, [prompt + caption for caption in captions], settings.batch_size)
    return clip_scores_of_images(images, written, references, image_of_reference)

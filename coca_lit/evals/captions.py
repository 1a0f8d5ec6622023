"""Scores of generated captions, which are written to files before they are scored."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from coca_lit import extensions
from coca_lit.data.records import Record
from coca_lit.distributed import host_group, rank, world_size
from coca_lit.errors import DataError
from coca_lit.evals.base import Evaluation, Settings
from coca_lit.evals.inference import caption_images, embed_pairs, embed_texts
from coca_lit.evals.samples import caption_samples, sample_sheet, worst_captions
from coca_lit.metrics.captions import CLIP_PROMPT, CaptionMetric, are_novel, clip_scores
from coca_lit.metrics.java.meteor import warm_up
from coca_lit.metrics.java.runtime import JavaError
from coca_lit.metrics.uncertainty import JUDGE, Parts, Ratios, bootstrap
from coca_lit.models import CoCa, DualEncoder
from coca_lit.progress import ProgressBar

# A score of one's own, of the records and their captions by image id: score -> a number for each image, in the order of
# the records, and a second one. The score is the sum of the first over the sum of the second, and the mean over the
# images if that is None.
Measure = Callable[[Sequence[Record], dict[int | str, str]], Parts]


class CaptionScores(Evaluation):
    """Captions against their references: BLEU, METEOR, ROUGE-L, CIDEr, exact matches.

    With `settings.full` also SPICE (if its jars are there), the scores of each nocaps domain, statistics of the
    captions, the share of novel ones, CLIPScore and RefCLIPScore.

    Args:
        training_captions: returns the captions of the training split; a caption that is not among them is novel.
        measures: further scores, called with the records and the captions with `settings.full`, see `Measure`.
    """

    captioned = True
    score_names = (*(f"Bleu_{n}" for n in range(1, 5)), "METEOR", "ROUGE_L", "CIDEr", "exact_match")
    kinds_in_training = False
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
        self.training_captions = training_captions
        self.measures = dict(measures or {})
        if self.measures:
            self.final_score_names = None

    def scores(self, model: DualEncoder, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        if model.decoder is None:
            if settings.full:
                self.not_run[f"{self.name} captions"] = "the model has no decoder, so it writes no captions"
            return {}
        if rank() == 0:
            with suppress(OSError):  # without Java; `_compare` says so
                warm_up()  # METEOR takes seconds to load; let it do so while the model generates
        captions = self.write(model, records, settings)
        if rank() == 0:
            predictions = [{"image_id": id, "caption": caption} for id, caption in captions.items()]
            settings.write_json("predictions", f"{self.name}.json", predictions)
            settings.write_json("samples", f"{self.name}_captions.json", caption_samples(records, captions))
            settings.write_image("samples", f"{self.name}.png", sample_sheet(records, captions))
        if not settings.full:
            return self._compare(CaptionMetric(), captions, records)
        if rank() == 0:
            settings.write_json("samples", f"{self.name}_worst.json", worst_captions(records, captions))
            if settings.attention:
                self._write_word_maps(model, records, settings)
        judged = _clip_scores(model, records, list(captions.values()), settings)
        means: Parts = {name: (values.double().numpy(), None) for name, values in judged.items()}
        with ProgressBar("SPICE") as bar:
            scores = self._compare(metric := CaptionMetric(table=True, progress=bar.reach), captions, records)
        measured = bootstrap(list(captions), Ratios(self._measured(records, captions)))
        self.draws = metric.draws | bootstrap(list(captions), Ratios(means)) | measured
        scores |= {name: values.mean().item() for name, values in judged.items()}
        return scores | {name: draws.score for name, draws in measured.items()}

    def write(self, model: CoCa, records: Sequence[Record], settings: Settings) -> dict[int | str, str]:
        """A caption of each record by its id, on every rank; a subclass may choose captions in another way."""
        return caption_images(model, records, settings.batch_size, settings.workers, settings.generate or {})

    def _write_word_maps(self, model: CoCa, records: Sequence[Record], settings: Settings) -> None:
        targets = list(extensions.declared("word_map_samples").values())
        if not targets:
            self.not_run[f"{self.name} attention"] = "no installed project says where words come from"
            return
        samples = extensions.load(targets[0])(model, records, settings.attention, settings.generate or {})
        settings.write_json("samples", f"{self.name}_attention.json", samples)

    def depends_on(self, score: str, settings: Settings) -> dict[str, Any]:
        judged = score.endswith("CLIPScore")
        return super().depends_on(score, settings) | ({JUDGE: settings.clip_score_model} if judged else {})

    def _measured(self, records: Sequence[Record], captions: dict[int | str, str]) -> Parts:
        """What the measures find. A score whose data cannot be read, or that is a share of nothing, is not run."""
        measures = self.measures if self.training_captions is None else {"novel": self._novel, **self.measures}
        parts: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        for measure, function in measures.items():
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

    def _novel(self, records: Sequence[Record], captions: dict[int | str, str]) -> Parts:
        """`Measure` of captions that are not in the training split, which may lie elsewhere: then it is not run."""
        assert self.training_captions is not None
        novel = are_novel([captions[record.id] for record in records], self.training_captions())
        return {"novel": (np.array(novel, dtype=np.float64), None)}

    def _compare(
        self, metric: CaptionMetric, captions: Mapping[int | str, str], records: Sequence[Record]
    ) -> dict[str, float]:
        """The scores that can be computed, on every rank; `not_run` says which cannot, and why."""
        if dist.is_available() and dist.is_initialized():  # NCCL gathers nothing on the host, and waits minutes at most
            metric.process_group = host_group("objects")
        of_rank = records[rank() :: world_size()]
        ids = [record.id for record in of_rank]
        references = [record.captions for record in of_rank]
        domains = [record.domain for record in of_rank]
        metric.update(ids, [captions[id] for id in ids], references, domains)
        try:
            scores = metric.compute()
            missing = metric.not_run
        except (JavaError, FileNotFoundError) as error:  # of the tokenizer, which all scores need
            scores = {}
            missing = {"captions": str(error)}
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
    prompt = CLIP_PROMPT if judge.tokenizer.unk_id is None else ""  # a closed vocabulary lacks its words
    images, references, image_of_reference = embed_pairs(judge, records, settings.batch_size, settings.workers, prompt)
    written = embed_texts(judge, [prompt + caption for caption in captions], settings.batch_size)
    return clip_scores(images, written, references, image_of_reference)

"""Scores during training and at its end, and those of `coca-evaluate`.

Each callback owns its data set; the scores themselves are pure functions in `coca_lit.evals`.
"""

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from coca_lit.checkpoints import load_model
from coca_lit.data.classification import Classification
from coca_lit.data.records import Record
from coca_lit.distributed import broadcast_object, rank, say
from coca_lit.evals.caption_table import caption_table, exact_match
from coca_lit.evals.captioning import caption_scores
from coca_lit.evals.clipscore import PROMPT, clip_scores
from coca_lit.evals.collect import caption_images, embed_images, embed_pairs, embed_texts
from coca_lit.evals.meteor import warm_up
from coca_lit.evals.retrieval import retrieval_scores
from coca_lit.evals.sample_data import caption_samples, retrieval_samples
from coca_lit.evals.samples import sample_sheet
from coca_lit.evals.statistics import novel_share
from coca_lit.evals.zeroshot import class_features, classification_scores
from coca_lit.models import CoCa
from coca_lit.sharding import unsharded


class Evaluation(L.Callback):
    """Scores the network on captioned images: on a few of them after an epoch, on all of them when training ends.

    Args:
        name: prefix of the scores, as in `mscoco/CIDEr`.
        records: the images and all their captions.
        output_dir: the run folder.
        limit: score at most so many images, even at the end.
        quick: how many images are scored during training.
        every_n_epochs: epochs between two scores during training; 0 for the end only.
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
    ) -> None:
        self.name = name
        self.records = records[:limit]
        self.output_dir = Path(output_dir)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.quick = quick
        self.every_n_epochs = every_n_epochs
        self.results: dict[str, float] = {}  # of the whole data set, after training
        self.not_run: dict[str, str] = {}  # score -> why it could not be computed

    @abstractmethod
    def scores(self, model: CoCa, records: Sequence[Record]) -> dict[str, float]:
        """Scores of the model on the records, the same on every rank."""

    def all_scores(self, model: CoCa) -> dict[str, float]:
        """Scores on all records, also those that are too slow for the time of training. May note in `not_run` what is
        missing.
        """
        return self.scores(model, self.records)

    def evaluate(self, model: CoCa) -> dict[str, float]:
        """Scores on all records, named `name/score`."""
        say(f"scoring {len(self.records)} images of {self.name} ({type(self).__name__})")
        self.results = self._named(self.all_scores(model))
        return self.results

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        last = trainer.current_epoch + 1 == trainer.max_epochs  # the full scores follow at once
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0 and not last:
            few = self.records[: self.quick]
            with unsharded(_net(pl_module)) as net:
                scores = self._named(self.scores(net, few))
            pl_module.log_dict(scores, rank_zero_only=False, sync_dist=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with unsharded(_net(pl_module)) as net:
            results = self.evaluate(net)
        for logger in trainer.loggers:
            logger.log_metrics(results, step=trainer.global_step)

    def write_json(self, folder: str, name: str, content: Any) -> None:
        """Writes into a folder inside the run folder."""
        (self.output_dir / folder).mkdir(parents=True, exist_ok=True)
        (self.output_dir / folder / name).write_text(json.dumps(content, indent=0))

    def _named(self, scores: dict[str, float]) -> dict[str, float]:
        return {f"{self.name}/{score}": value for score, value in scores.items()}


class RetrievalScores(Evaluation):
    """Recall@1/5/10 in both directions, with all captions of every image. At the end also samples for the report."""

    def scores(self, model: CoCa, records: Sequence[Record]) -> dict[str, float]:
        return retrieval_scores(*embed_pairs(model, records, self.batch_size, self.num_workers))

    def all_scores(self, model: CoCa) -> dict[str, float]:
        images, texts, image_of_text = embed_pairs(model, self.records, self.batch_size, self.num_workers)
        if rank() == 0:
            samples = retrieval_samples(self.records, images, texts, image_of_text)
            self.write_json("samples", f"{self.name}_retrieval.json", samples)
        return retrieval_scores(images, texts, image_of_text)


class ZeroShotScores(Evaluation):
    """Top-1, top-5 and mean per-class recall of the classes nearest to the images, with all prompts of every class.

    Args:
        images: the classified images with class names and templates, see `coca_lit.data.classification`.
    """

    def __init__(
        self,
        name: str,
        images: Classification,
        output_dir: str | Path,
        batch_size: int = 64,
        num_workers: int = 0,
        limit: int | None = None,
        quick: int = 256,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(name, images.records, output_dir, batch_size, num_workers, limit, quick, every_n_epochs)
        self.labels = images.labels
        self.prompts = [template.replace("{}", c) for c in images.class_names for template in images.templates]
        self.classes = len(images.class_names)

    def scores(self, model: CoCa, records: Sequence[Record]) -> dict[str, float]:
        prompts = embed_texts(model, self.prompts, self.batch_size).unflatten(0, (self.classes, -1))  # (C, P, E)
        images = embed_images(model, records, self.batch_size, self.num_workers)  # (I, E)
        labels = torch.tensor([self.labels[record.id] for record in records])
        return classification_scores(images @ class_features(prompts).T, labels)


class CaptionScores(Evaluation):
    """Captions against their references: BLEU, METEOR, ROUGE-L, CIDEr, exact matches.

    At the end also SPICE (if its jars are there), the scores of each nocaps domain, statistics of the captions, and
    CLIPScore and RefCLIPScore. Predictions are written before they are scored.

    Args:
        clip_score_model: checkpoint that judges CLIPScore; None for the scored model, a partial judge of its own
            captions.
        training_captions: records whose captions count as known, for the share of novel captions.
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
        training_captions: Sequence[Record] = (),
    ) -> None:
        super().__init__(name, records, output_dir, batch_size, num_workers, limit, quick, every_n_epochs)
        self.clip_score_model = clip_score_model
        self.training_captions = [caption for record in training_captions for caption in record.captions]

    def scores(self, model: CoCa, records: Sequence[Record]) -> dict[str, float]:
        if model.decoder is None:
            return {}
        captions = self._captions(model, records)
        scores: dict[str, float] = {}
        if rank() == 0:
            scores = caption_scores({r.id: r.captions for r in records}, captions)
            scores["exact_match"] = exact_match({r.id: r.captions for r in records}, captions)
        return broadcast_object(scores)

    def all_scores(self, model: CoCa) -> dict[str, float]:
        if model.decoder is None:
            self.not_run[f"{self.name} captions"] = "the model has no decoder, so it writes no captions"
            return {}
        captions = self._captions(model, self.records)
        clip_scores = self._clip_scores(model, list(captions.values()))
        table: tuple[dict[str, float], dict[str, str]] = ({}, {})
        if rank() == 0:
            table = caption_table(
                {r.id: r.captions for r in self.records}, captions, {r.id: r.domain for r in self.records}
            )
        scores, not_run = broadcast_object(table)
        self.not_run |= {f"{self.name} {score}": reason for score, reason in not_run.items()}
        if self.training_captions:
            scores["novel"] = novel_share(captions.values(), self.training_captions)
        return scores | clip_scores

    def _clip_scores(self, model: CoCa, captions: Sequence[str]) -> dict[str, float]:
        judge = model if self.clip_score_model is None else load_model(self.clip_score_model).to(model.device)
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
        captions = caption_images(model, records, self.batch_size, self.num_workers)
        if rank() == 0:
            predictions = [{"image_id": id, "caption": caption} for id, caption in captions.items()]
            self.write_json("predictions", f"{self.name}.json", predictions)
            self.write_json("samples", f"{self.name}_captions.json", caption_samples(records, captions))
            sample_sheet(records, captions).save(self.output_dir / "samples" / f"{self.name}.png")
        return captions


def _net(module: L.LightningModule) -> CoCa:
    net = module.net
    assert isinstance(net, CoCa)
    return net

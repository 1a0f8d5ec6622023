"""Scores during training and at its end, and those of `coca-evaluate`: what all kinds of evaluation share.

Each callback owns its data set; the scores themselves are pure functions in `coca_lit.evals`.
"""

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch.nn.utils import parametrize

from coca_lit.callbacks.averaging import scored_weights
from coca_lit.data.records import Record
from coca_lit.distributed import print_rank_zero
from coca_lit.models import CoCa, DualEncoder
from coca_lit.training.sharding import unsharded


class Evaluation(L.Callback):
    """Scores the network on captioned images: on a few of them after an epoch, on all of them when training ends. With
    averaged weights it is the average that is scored. Scores are named `mscoco/CIDEr`, those of a part of the images
    `mscoco_256/CIDEr`.

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
        self._scored = False

    @abstractmethod
    def scores(self, model: DualEncoder, records: Sequence[Record]) -> dict[str, float]:
        """Scores of the model on the records, the same on every rank."""

    def all_scores(self, model: DualEncoder) -> dict[str, float]:
        """Scores on all records, also those that are too slow for the time of training. May note in `not_run` what is
        missing.
        """
        return self.scores(model, self.records)

    def evaluate(self, model: DualEncoder) -> dict[str, float]:
        """Scores on all records, named `name/score`."""
        print_rank_zero(f"scoring {len(self.records)} images of {self.name} ({type(self).__name__})")
        self.results = self._named(self.all_scores(model), len(self.records))
        return self.results

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        stops = trainer.should_stop or epochs == trainer.max_epochs or 0 <= trainer.max_steps <= trainer.global_step
        if self.every_n_epochs and epochs % self.every_n_epochs == 0 and not stops:  # else the full scores follow
            few = self.records[: self.quick]
            with scored_weights(trainer, pl_module), _scorable(pl_module) as net:
                scores = self._named(self.scores(net, few), len(few))
            pl_module.log_dict(scores, rank_zero_only=False, sync_dist=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._final(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._scored:  # a finished run was loaded: there was nothing to train, and so no end of training
            pl_module.to(trainer.strategy.root_device)
            self._final(trainer, pl_module)

    def _final(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._scored = True
        with _scorable(pl_module) as net:
            results = self.evaluate(net)
        for logger in trainer.loggers:
            logger.log_metrics(results, step=trainer.global_step)

    def write_json(self, folder: str, name: str, content: Any) -> None:
        """Writes into a folder inside the run folder."""
        (self.output_dir / folder).mkdir(parents=True, exist_ok=True)
        (self.output_dir / folder / name).write_text(json.dumps(content, indent=0))

    def _named(self, scores: dict[str, float], images: int) -> dict[str, float]:
        """Scores of a part of the images say how many they are: no curve jumps from one set of images to another."""
        name = self.name if images == len(self.records) else f"{self.name}_{images}"
        return {f"{name}/{score}": value for score, value in scores.items()}


@contextmanager
def _scorable(module: L.LightningModule) -> Iterator[CoCa]:
    """The network as the scores need it: whole, and not through `torch.compile`, for which a growing cache would be
    something new at every token. Low-rank updates are added to their weights once, not at every token.
    """
    with torch.compiler.set_stance("force_eager"), parametrize.cached(), unsharded(_net(module)) as net:
        yield net


def _net(module: L.LightningModule) -> CoCa:
    net = module.net
    assert isinstance(net, CoCa)
    return net

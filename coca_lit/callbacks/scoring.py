"""When evaluations run: during training on a few images, and at its end on all of them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parametrize

from coca_lit.callbacks.averaging import scored_weights
from coca_lit.callbacks.checkpoint import Checkpoints
from coca_lit.callbacks.loggers import log_pictures
from coca_lit.callbacks.progress import not_timed
from coca_lit.distributed import forked_rng, print_rank_zero
from coca_lit.errors import ConfigError, check_number, suggest
from coca_lit.evals import Evaluation, Settings
from coca_lit.models import CoCa, kernels
from coca_lit.runs.results import Found
from coca_lit.training.lightning_fixes import accumulates, callbacks_of


class ScoreDuringTraining(L.Callback):
    """Scores the network on the first few images of each evaluation every N epochs or steps, and on all of them when
    training ends. With averaged weights it is the average that is scored.

    Scores are named `mscoco/CIDEr`, scores of the first 256 images `mscoco_256/CIDEr`. They are logged, and told to
    `Checkpoints`, which keeps the best checkpoint. Place this callback after `Averaging`.

    Args:
        evals: what to score. An evaluation with `every=2` takes part in every second scoring, with 0 only at the end.
        settings: what the evaluations share.
        every_n_epochs: epochs between two scorings during training; None for none.
        every_n_steps: optimizer steps between two scorings during training; None for none.
        quick: how many images of each evaluation are scored during training.

    Attributes:
        found: the final scores of all images, and what belongs to them, see `Found`.
    """

    def __init__(
        self,
        evals: Sequence[Evaluation],
        settings: Settings,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        quick: int = 256,
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps), ("quick", quick)):
            if value is not None:
                check_number(name, value, whole=True, at_least=1)
        self.evals = list(evals)
        self.settings = settings
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.quick = quick
        self.found = Found()
        self._finished = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for checkpoints in callbacks_of(trainer, Checkpoints):
            if checkpoints.best is None:
                continue
            self.check_score("callbacks.checkpoint.best", checkpoints.best.score, at_end=False)
            checkpoints.best.of = {
                "quick": self.quick,
                "split": self.settings.split,
                "images": self.settings.images,
                "clip_score_model": self.settings.clip_score_model,
                "rerank": self.settings.rerank,
                "generate": str(self.settings.generate),
            }

    def check_score(self, key: str, score: str, at_end: bool) -> None:
        """Raises `ConfigError`, which names `key`, for a score that no evaluation computes at the end or, unless
        `at_end`, during training.
        """
        name, _, measure = score.partition("/")
        named = [e for e in self.evals if e.name == name] if at_end else self._named(name)
        scored = named if at_end else [e for e in named if e.every and (self.every_n_epochs or self.every_n_steps)]
        of_the_end = [e.final_score_names if at_end else () for e in scored]
        known = [n for e, more in zip(scored, of_the_end, strict=True) for n in (*e.score_names, *(more or ()))]
        kinds = "/" in measure and any(at_end or e.kinds_in_training for e in scored)
        open_ended = kinds or None in of_the_end or not all(e.score_names for e in scored)  # own metrics
        if not named:
            names = dict.fromkeys(e.name for e in self.evals)
            raise ConfigError(f"{key}: there is no evaluation '{name}'{suggest(name, names)} {_listed(names)}")
        if not scored:
            raise ConfigError(f"{key}: '{name}' is scored at the end only: set scoring.every_n_epochs and its `every`")
        if measure not in known and (not open_ended or measure.lower() in map(str.lower, known)):
            raise ConfigError(f"{key}: '{name}' has no score '{measure}'{suggest(measure, known)} {_listed(known)}")

    def _named(self, name: str) -> list[Evaluation]:
        """The evaluations whose scores begin with a name, such as mscoco or, during training, mscoco_256."""
        return [e for e in self.evals if name in (e.name, e.name_of(self.settings, self.quick))]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if accumulates(trainer):
            return
        step = trainer.global_step
        last_batch = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
        if not _ends(trainer, last_batch) and (due := self._due(step, self.every_n_steps)):
            scores = self._score(trainer, pl_module, due)
            pl_module.log_dict(scores, logger=False, rank_zero_only=False, sync_dist=False, batch_size=1)
            for logger in trainer.loggers:  # now, regardless of log_every_n_steps; rows count steps from 0
                logger.log_metrics(scores, step=step - 1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scored = self._due(trainer.global_step, self.every_n_steps)
        due = [e for e in self._due(trainer.current_epoch + 1, self.every_n_epochs) if e not in scored]
        if due and not _ends(trainer, last_batch=True):
            pl_module.log_dict(self._score(trainer, pl_module, due), rank_zero_only=False, sync_dist=False)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._finished:  # a finished run was loaded: there was nothing to train, and so no end of training
            pl_module.to(trainer.strategy.root_device)
            self.on_train_end(trainer, pl_module)

    def _due(self, count: int, every: int | None) -> list[Evaluation]:
        """The evaluations that take part after this number of epochs or steps."""
        return [e for e in self.evals if every and e.every and count % (every * e.every) == 0]

    def _score(self, trainer: L.Trainer, pl_module: L.LightningModule, due: Sequence[Evaluation]) -> dict[str, float]:
        scores: dict[str, float] = {}
        with scored_weights(trainer, pl_module), _scorable(pl_module) as net:
            settings = replace(self.settings, full=False)
            for evaluation in due:
                scores |= evaluation.evaluate(net, settings, self.quick)
                for score, reason in evaluation.not_run.items():
                    print_rank_zero(f"{score} not run: {reason}")
        self._log_pictures(trainer, due)
        self._tell_checkpoints(trainer, scores, due)
        return scores

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores all images."""
        self._finished = True
        # To find the best checkpoint, the last weights are scored on the same few images as all weights before.
        rivals: list[Evaluation] = []
        for checkpoints in callbacks_of(trainer, Checkpoints):
            if checkpoints.best is not None:
                name = checkpoints.best.score.partition("/")[0]
                rivals += [evaluation for evaluation in self._named(name) if evaluation.every]
        few: dict[str, float] = {}
        with _scorable(pl_module) as net:
            for evaluation in rivals:  # first: the predictions of all images are to stay in the run folder
                if evaluation.name_of(self.settings, self.quick) != evaluation.name:
                    few |= evaluation.evaluate(net, replace(self.settings, full=False), self.quick)
            for evaluation in self.evals:
                scores = evaluation.evaluate(net, self.settings)
                self.found.add(evaluation, scores)
                for logger in trainer.loggers:
                    logger.log_metrics(scores, step=trainer.global_step)
        self._log_pictures(trainer, self.evals)
        self._tell_checkpoints(trainer, self.found.scores | few, rivals, final=True)

    def _log_pictures(self, trainer: L.Trainer, scored: Sequence[Evaluation]) -> None:
        names = list(dict.fromkeys(evaluation.name for evaluation in scored))
        log_pictures(trainer, Path(self.settings.output_dir, "samples"), names, trainer.global_step)

    def _tell_checkpoints(
        self, trainer: L.Trainer, scores: dict[str, float], scored: Sequence[Evaluation], final: bool = False
    ) -> None:
        """Tells `Checkpoints` the score that it compares, of the weights at hand.

        Raises:
            ConfigError: there is no such score, though all evaluations of that name were run.
        """
        for checkpoints in callbacks_of(trainer, Checkpoints):
            if checkpoints.best is None:
                continue
            best = checkpoints.best.score
            name, _, measure = best.partition("/")
            named = [e for e in self._named(name) if e.every]
            keys = [f"{e.name_of(self.settings, self.quick)}/{measure}" for e in named]
            found = [scores[key] for key in keys if key in scores]
            if found and final:
                checkpoints.note_final_score(trainer, found[0])
            elif found:
                checkpoints.note_score(found[0])
            elif all(e in scored for e in named):
                missing = f"there is no score '{best}'{suggest(best, scores)} {_listed(scores)}"
                if not final and not any(e.not_run for e in named):
                    raise ConfigError(f"callbacks.checkpoint.best: {missing}")
                print_rank_zero(missing)  # it may come next time; and scores of a run that is over must not get lost


def _listed(names: Iterable[str]) -> str:
    return f"There are {', '.join(names) or 'none'}"


def _ends(trainer: L.Trainer, last_batch: bool) -> bool:
    """Whether training ends here, so that the scores of all images follow."""
    last_epoch = last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.should_stop or last_epoch or 0 <= trainer.max_steps <= trainer.global_step


@contextmanager
def _scorable(module: L.LightningModule) -> Iterator[CoCa]:
    """The network as evaluations need it. Evaluations leave the random state of training untouched.

    It is whole on every rank, and not compiled: a cache that grows with every token would be recompiled at each token.
    fp32 is exact, so that scores equal `coca-evaluate`'s. Low-rank updates are added to their weights once, not at
    every token.
    """
    net = module.net
    assert isinstance(net, CoCa)
    device = next(net.parameters()).device
    with (
        not_timed(module.trainer),
        isolate_rng(include_cuda=False),
        forked_rng(device),
        torch.compiler.set_stance("force_eager"),
        kernels.exact_fp32(device),
        parametrize.cached(),
    ):
        objectives = module.objectives
        assert isinstance(objectives, nn.ModuleDict)
        trained = {name: objective.training for name, objective in objectives.items()}
        if isinstance(net, FSDPModule):
            from coca_lit.training.sharding import unsharded, unsharded_objectives

            net = unsharded(net)
            net.objectives = unsharded_objectives(objectives, net)
        else:
            net.objectives = dict(objectives.items())
        for objective in net.objectives.values():
            objective.eval()
        try:
            yield net
        finally:
            net.objectives = {}
            for name, objective in objectives.items():
                objective.train(trained[name])

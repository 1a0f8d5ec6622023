"""Trials of a sweep that Optuna chooses, with any launcher."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Transformer
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from coca_lit.cli.allowed import check_names, hydra_builds
from coca_lit.errors import ConfigError, TrainingError
from coca_lit.metrics import lower_is_better
from coca_lit.projects.clusters.launchers import require

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

log = logging.getLogger(__name__)


class OptunaSweeper(Sweeper):
    """Asks a study for values of the swept keys, `n_jobs` trials at a time, and tells it their scores.

    Args:
        sampler: `_target_` and arguments of one of Optuna's samplers.
        direction: "maximize" or "minimize".
        storage: URL of the database that keeps the study; None for memory.
        n_trials: how many this command makes, besides those that the study has already.
        max_failure_rate: of the trials that run side by side; above it the sweep ends.
        params: further overrides, as if on the command line.
    """

    def __init__(
        self,
        sampler: DictConfig,
        direction: Literal["maximize", "minimize"],
        storage: str | None,
        study_name: str | None,
        n_trials: int,
        n_jobs: int,
        max_failure_rate: float,
        params: Mapping[str, Any],
    ) -> None:
        require("hydra/sweeper=optuna_study", "optuna", "optuna")
        if n_trials < 1 or n_jobs < 1:
            raise ConfigError(f"hydra.sweeper: n_trials={n_trials} and n_jobs={n_jobs} must be at least 1")
        self.sampler, self.direction, self.storage, self.study_name = sampler, direction, storage, study_name
        self.n_trials, self.n_jobs, self.max_failure_rate, self.params = n_trials, n_jobs, max_failure_rate, params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        objective = config.scoring.objective
        wanted = "minimize" if objective is not None and lower_is_better(objective) else "maximize"
        if self.direction != wanted:
            raise ConfigError(
                f"scoring.objective={objective} needs hydra.sweeper.direction={wanted}, got {self.direction}"
            )
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        from optuna.trial import TrialState

        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        overrides = {o.get_key_element(): o for o in OverridesParser.create().parse_overrides(words)}
        fixed = [f"{k}={o.get_value_element_as_str()}" for k, o in overrides.items() if not o.is_sweep_override()]
        space = {key: distribution(o) for key, o in overrides.items() if o.is_sweep_override()}
        assert self.launcher is not None
        study, made = self._open(), 0
        while made < self.n_trials:
            try:
                trials = [study.ask(space) for _ in range(min(self.n_jobs, self.n_trials - made))]
            except ValueError as error:
                raise ConfigError(
                    f"the study '{study.study_name}' has searched other values of the same keys ({error}): "
                    "set hydra.sweeper.study_name=NAME to begin another one"
                ) from error
            jobs = [[*(f"{key}={value}" for key, value in trial.params.items()), *fixed] for trial in trials]
            self.validate_batch_is_legal(jobs)
            failed = 0
            for trial, result in zip(trials, self.launcher.launch(jobs, initial_job_idx=made), strict=True):
                score = result.return_value
                if isinstance(score, int | float) and not math.isnan(score):
                    study.tell(trial, float(score))
                else:
                    study.tell(trial, state=TrialState.FAIL)
                    log.info("trial %d failed", trial.number)
                    failed += 1
            made += len(trials)
            if failed / len(trials) > self.max_failure_rate:
                raise TrainingError(
                    f"{failed} of {len(trials)} trials failed, more than hydra.sweeper.max_failure_rate="
                    f"{self.max_failure_rate} allows"
                )
        self._conclude(study)

    def _open(self) -> "optuna.Study":
        """The study, new or continued. Trials of an earlier process that was killed are failed."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        check_names(self.sampler, "hydra.sweeper.sampler", "optuna")
        with hydra_builds("optuna"):
            sampler = instantiate(self.sampler)
        study = optuna.create_study(
            study_name=self.study_name,
            storage=self.storage,
            sampler=sampler,
            direction=self.direction,
            load_if_exists=True,
        )
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            log.info("trial %d was killed: failed", trial.number)
        return study

    def _conclude(self, study: "optuna.Study") -> None:
        from optuna.trial import TrialState

        if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            return
        assert self.config is not None
        best = study.best_trial
        log.info("Best parameters: %s", best.params)
        log.info("Best value: %s", best.value)
        found = {"name": "optuna", "best_params": best.params, "best_value": best.value}
        OmegaConf.save(OmegaConf.create(found), Path(self.config.hydra.sweep.dir) / "optimization_results.yaml")


def distribution(override: Override) -> "BaseDistribution":
    """What a sweep in Hydra's grammar means to Optuna: `1,2`, `choice(a,b)`, `range(1,9,2)`, `interval(0,1)`,
    `tag(log,interval(1e-4,1e-2))`. Those of whole numbers are `int(interval(1,16))`.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep: Any = override.value()
    if isinstance(sweep, IntervalSweep):
        whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
        kind: Any = IntDistribution if whole else FloatDistribution
        return kind(sweep.start, sweep.end, log="log" in sweep.tags)
    values: Sequence[Any] = [*override.sweep_iterator(transformer=Transformer.encode)]
    if override.is_range_sweep() and not sweep.shuffle:
        kind = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
        return kind(min(values), max(values), step=abs(sweep.step))
    return CategoricalDistribution(values)

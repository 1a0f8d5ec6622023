"""Hydra takes launchers and sweepers from this namespace package alone, and imports it in every run. What they do is in
`coca_lit.projects.clusters`, which is imported when a sweep begins.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper


class JobsLauncher(Launcher):
    """Stands for the class of its name in `coca_lit.projects.clusters.launchers`, with the same options."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, **sweep: Any) -> None:
        from coca_lit.projects.clusters import launchers

        self.launcher: Launcher = getattr(launchers, type(self).__name__)(**self.options)
        self.launcher.setup(**sweep)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self.launcher.launch(job_overrides, initial_job_idx)


class JoblibLauncher(JobsLauncher):
    """`hydra/launcher=joblib_jobs`"""

    one_process_per_job = True


class RayLauncher(JobsLauncher):
    """`hydra/launcher=ray_jobs`"""

    one_process_per_job = True


class SlurmLauncher(JobsLauncher):
    """`hydra/launcher=slurm_jobs`"""


class OptunaSweeper(Sweeper):
    """`hydra/sweeper=optuna_study`, see `coca_lit.projects.clusters.study`."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, **sweep: Any) -> None:
        from coca_lit.projects.clusters.study import OptunaSweeper

        self.sweeper = OptunaSweeper(**self.options)
        self.sweeper.setup(**sweep)

    def sweep(self, arguments: list[str]) -> Any:
        return self.sweeper.sweep(arguments)

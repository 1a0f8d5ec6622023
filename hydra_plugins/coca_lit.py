"""Hydra takes launchers and sweepers from this namespace package alone; what they do is in `coca_lit.cli`."""

from coca_lit.cli import launchers, study


class JoblibLauncher(launchers.JoblibLauncher):
    """`hydra/launcher=joblib_jobs`"""


class RayLauncher(launchers.RayLauncher):
    """`hydra/launcher=ray_jobs`"""


class SlurmLauncher(launchers.SlurmLauncher):
    """`hydra/launcher=slurm_jobs`"""


class OptunaSweeper(study.OptunaSweeper):
    """`hydra/sweeper=optuna_study`"""

"""Shards as the jobs of a SLURM array, or as the tasks of a Ray cluster.

    engine=slurm engine.partition=gpu | engine=ray engine.ray.init.address=auto

The launchers of sweeps run the jobs; folders must be shared by all machines. What dies starts again: under SLURM a job
that is preempted or loses its node, on Ray a task that loses its worker.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from coca_lit.errors import ConfigError
from coca_lit.projects.clusters.launchers import RayLauncher, SlurmLauncher
from coca_lit.tools.engines import Machine, Runnable


class Ray(RayLauncher):
    """A task of a Ray cluster for each job."""

    choice, key = "engine=ray", "engine"


class Slurm(SlurmLauncher):
    """A SLURM array, of which each job takes `shards_per_job` shards and works on them as `Machine(devices)` does."""

    choice, key = "engine=slurm", "engine"

    def __init__(self, shards_per_job: int, devices: str | Sequence[int | str] | None, **options: Any) -> None:
        if shards_per_job < 1:
            raise ConfigError(f"engine.shards_per_job must be at least 1, got {shards_per_job}")
        if (options.get("nodes") or 1) != 1 or (options.get("tasks_per_node") or 1) != 1:
            raise ConfigError(
                "engine.nodes and engine.tasks_per_node must be 1: more shards at a time are more jobs, or with "
                "engine.gpus_per_node=8 engine.devices=auto a process for each GPU of a job"
            )
        super().__init__(**options)
        self.size, self.machine = shards_per_job, Machine(devices)

    def run(self, jobs: Sequence[Runnable]) -> Iterator[tuple[int, Any]]:
        parts = [_Part(jobs[start : start + self.size], self.machine) for start in range(0, len(jobs), self.size)]
        for number, outcome in super().run(parts):
            for i in range(len(parts[number].jobs)):
                yield number * self.size + i, outcome if isinstance(outcome, str) else outcome[i]


class _Part(NamedTuple):
    jobs: Sequence[Runnable]
    machine: Machine

    def __call__(self) -> list[Any]:
        outcomes = dict(self.machine.run(self.jobs))
        return [outcomes[i] for i in range(len(self.jobs))]

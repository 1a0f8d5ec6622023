"""Launchers for the jobs of a sweep: processes on this machine, a Ray cluster, SLURM.

Hydra's own plugins for these lose all results when one process dies. A launcher here takes picklable jobs and returns
for each its result, or the reason why its process ended without one. A dead job is recorded as failed; all others run
to their end. `coca_lit.projects.clusters.engines` runs other jobs with them.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from multiprocessing import connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from coca_lit.cli.sweep import RECORD, SWEEP_VARIABLE, override_values
from coca_lit.errors import ConfigError
from coca_lit.files import write_json
from coca_lit.machine import processors
from coca_lit.reading import read_json
from coca_lit.tools.engines import Runnable

if TYPE_CHECKING:
    import submitit

log = logging.getLogger(__name__)

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit codes of a run that a signal stopped, with all saved


def require(choice: str, extra: str, package: str) -> None:
    """Raises `ConfigError` if an optional package is not installed."""
    if find_spec(package) is None:
        raise ConfigError(f"{choice} needs {package}: pip install -e '.[{extra}]' (or 'coca_lit[{extra}]')")


class Job(NamedTuple):
    """A job that composes its config and runs in the process that calls it."""

    overrides: Sequence[str]
    number: int
    config: DictConfig  # of the sweep
    context: HydraContext
    function: TaskFunction
    state: Any  # of Hydra's singletons, resolvers among them
    folder: str  # relative paths are relative to it

    def compose(self) -> DictConfig:
        config = self.context.config_loader.load_sweep_config(self.config, [*self.overrides])
        with open_dict(config.hydra.job):
            config.hydra.job.id, config.hydra.job.num = f"{config.hydra.job.name}_{self.number}", self.number
        return config

    def __call__(self) -> JobReturn:
        os.chdir(self.folder)  # the processes of a Ray cluster start elsewhere
        Singleton.set_state(self.state)
        setup_globals()
        try:
            return run_job(
                hydra_context=self.context,
                task_function=self.function,
                config=self.compose(),
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except SystemExit as stopped:
            if stopped.code not in STOPPED:  # else its record says that it was stopped
                raise
            return JobReturn(overrides=self.overrides, status=JobStatus.COMPLETED)


class JobsLauncher(Launcher):
    """What the launchers have in common.

    Attributes:
        choice, key: how the command line chooses this launcher, and where its options are.
    """

    choice: str
    key = "hydra.launcher"

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.context, self.function = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        shared = (self.config, self.context, self.function, Singleton.get_state(), os.getcwd())
        jobs = [Job(overrides, initial_job_idx + i, *shared) for i, overrides in enumerate(job_overrides)]
        for job in jobs:
            log.info("#%d: %s", job.number, " ".join(filter_overrides(job.overrides)))
        outcomes = dict(self.run(jobs))
        for i, job in enumerate(jobs):
            if isinstance(outcomes[i], str):
                record_death(job.compose(), f"job {job.number}: {outcomes[i]}")
                outcomes[i] = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
        return [outcomes[i] for i in range(len(jobs))]

    @abstractmethod
    def run(self, jobs: Sequence[Runnable]) -> Iterator[tuple[int, Any]]:
        """As each job ends, its number and its result, or the reason (a str) why its process ended without one."""


def record_death(config: DictConfig, reason: str) -> None:
    """Records as failed a job whose process ended before it could do so itself.

    Args:
        config: of the job, with Hydra's part.
    """
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        folder = Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir
        sweep, overrides = config.hydra.job.env_set[SWEEP_VARIABLE], override_values(config.hydra.overrides.task)
    finally:
        HydraConfig.instance().cfg = before
    folder.mkdir(parents=True, exist_ok=True)
    record = read_json(folder / RECORD, dict) if (folder / RECORD).exists() else {}
    if record.get("sweep") != sweep:
        record = {"sweep": sweep, "begun": time.time(), "overrides": overrides, "status": "unfinished"}
    if record["status"] == "unfinished":
        write_json(folder / RECORD, {**record, "status": "failed", "error": reason})


def death(code: int) -> str:
    """The reason that an exit code tells: negative, or above 128 from a shell, it is a signal."""
    number = -code if code < 0 else code - 128
    if number == getattr(signal, "SIGKILL", None):  # unknown to Windows
        return "killed by SIGKILL, which the kernel sends when memory runs out"
    if number in [*signal.Signals]:
        return f"killed by {signal.Signals(number).name}"
    return f"the process ended with exit code {code} and without a result"


# This machine


class JoblibLauncher(JobsLauncher):
    """A process for each job, `n_jobs` at a time; -1: as many as there are cores."""

    choice = "hydra/launcher=joblib_jobs"

    def __init__(self, n_jobs: int) -> None:
        if n_jobs != -1 and n_jobs < 1:
            raise ConfigError(f"{self.key}.n_jobs must be at least 1, or -1 for all cores; got {n_jobs}")
        require(self.choice, "joblib", "cloudpickle")
        self.n_jobs = n_jobs if n_jobs > 0 else processors()

    def run(self, jobs: Sequence[Runnable]) -> Iterator[tuple[int, Any]]:
        import cloudpickle

        spawn = multiprocessing.get_context("spawn")
        waiting, running = [*range(len(jobs))], dict[int, tuple[int, Any]]()  # by the sentinel of the process
        with TemporaryDirectory() as folder:
            results = [Path(folder) / str(i) for i in waiting]
            try:
                while waiting or running:
                    while waiting and len(running) < self.n_jobs:
                        i = waiting.pop(0)
                        process = spawn.Process(target=_call, args=(cloudpickle.dumps(jobs[i]), results[i]))
                        process.start()
                        running[process.sentinel] = (i, process)
                    for sentinel in cast(list[int], connection.wait([*running])):
                        i, process = running.pop(sentinel)
                        process.join()
                        done = results[i].exists()
                        yield i, pickle.loads(results[i].read_bytes()) if done else death(process.exitcode)
            except KeyboardInterrupt:  # which the terminal sends to the jobs, too: they stop and save
                for _, process in running.values():
                    process.join()
                raise


def _call(job: bytes, result: Path) -> None:
    """Runs a pickled job in a process of its own and writes its result, whole or not at all."""
    import cloudpickle

    partial = result.with_suffix(".part")
    partial.write_bytes(cloudpickle.dumps(pickle.loads(job)()))
    partial.rename(result)


# Ray


class RayLauncher(JobsLauncher):
    """A process of a Ray cluster for each job.

    Args:
        ray: arguments of `ray.init` and of `ray.remote`.
    """

    choice = "hydra/launcher=ray_jobs"

    def __init__(self, ray: Mapping[str, Mapping[str, Any]]) -> None:
        require(self.choice, "ray", "ray")
        settings: Any = OmegaConf.to_container(OmegaConf.create(dict(ray)), resolve=True)
        self.init, self.remote = settings.get("init") or {}, settings.get("remote") or {}

    def run(self, jobs: Sequence[Runnable]) -> Iterator[tuple[int, Any]]:
        import ray

        started_here = not ray.is_initialized()  # a sweeper launches several batches
        if started_here:
            try:
                ray.init(**{name: value for name, value in self.init.items() if value is not None})
            except (ConnectionError, ValueError, TypeError) as error:
                raise ConfigError(f"{self.key}.ray.init: {error}") from error
        try:
            call = ray.remote(**{"max_calls": 1, **self.remote})(_run)  # the next job gets a new process
            waiting = {call.remote(job): i for i, job in enumerate(jobs)}
            while waiting:
                ended, _ = ray.wait([*waiting], num_returns=len(waiting), timeout=1.0)  # all that end within a second
                for reference in ended:
                    i = waiting.pop(reference)
                    try:
                        yield i, ray.get(reference)
                    except ray.exceptions.RayError as error:
                        yield i, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        finally:
            if started_here:
                ray.shutdown()


def _run(job: Runnable) -> Any:
    return job()


# SLURM

SHARED = {  # options that submitit knows without the prefix `slurm_`
    *("name", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min", "stderr_to_stdout")
}


class SlurmLauncher(JobsLauncher):
    """A SLURM job for each job, by submitit, whose options it takes."""

    choice = "hydra/launcher=slurm_jobs"

    def __init__(self, submitit_folder: str, max_num_timeout: int, **options: Any) -> None:
        require(self.choice, "slurm", "submitit")
        self.folder, self.max_num_timeout = submitit_folder, max_num_timeout
        self.options: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(options), resolve=True)  # type: ignore

    def run(self, jobs: Sequence[Runnable]) -> Iterator[tuple[int, Any]]:
        submitted = self._submit(jobs)
        waiting, pause = [*range(len(jobs))], 1.0
        while waiting:
            own = ",".join(dict.fromkeys(submitted[i].job_id.split("_")[0] for i in waiting))
            command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={own}"]
            done = subprocess.run(command, capture_output=True, text=True)  # before the results are looked for
            known = done.returncode == 0 or "Invalid job id" in done.stderr  # else SLURM does not answer
            queued = set(done.stdout.split())  # the jobs that wait, run or end right now
            for i in [*waiting]:
                task = submitted[i].task(0)
                over = known and submitted[i].job_id not in queued
                if over or task.paths.result_pickle.exists():
                    waiting.remove(i)
                    yield i, _submitit_result(task)
            if waiting:
                time.sleep(pause)
                pause = min(1.2 * pause, 30.0)

    def _submit(self, jobs: Sequence[Runnable]) -> "list[submitit.Job[Any]]":
        import submitit

        options = dict(self.options)
        if options.get("cpus_per_task"):  # which srun does not inherit
            processors = "export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
            options["setup"] = [processors, *(options.get("setup") or [])]
        try:
            executor = submitit.AutoExecutor(self.folder, cluster="slurm", slurm_max_num_timeout=self.max_num_timeout)
            executor.update_parameters(
                **{name if name in SHARED else f"slurm_{name}": value for name, value in options.items()}
            )
            with executor.batch():
                return [executor.submit(SubmittedJob(job)) for job in jobs]
        except submitit.core.utils.FailedJobError as error:
            gpus, text = self.options.get("gpus_per_node"), str(error)
            if gpus is not None and "generic resource" in text:
                raise ConfigError(
                    f"SLURM has no node with the GPUs that each job asks for (gpus_per_node={gpus}): set "
                    f"{self.key}.gpus_per_node=null to do without, or {self.key}.partition to one that has GPUs"
                ) from error
            lines = [line for line in text.splitlines() if "error:" in line] or text.splitlines()[-1:]
            raise ConfigError(f"SLURM refused the jobs: {' '.join(lines)}") from error
        except (RuntimeError, ValueError, NameError) as error:  # no srun, or an option that submitit lacks
            raise ConfigError(f"{self.choice}: {' '.join(str(error).split())}") from error


class SubmittedJob:
    """A job in the hands of submitit, which replaces handlers of signals and starts it again after preemption."""

    def __init__(self, job: Runnable) -> None:
        self.job, self.requeued = job, False

    def __call__(self) -> Any:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # submitit ignores it
        result = self.job()
        if isinstance(result, JobReturn) and result.hydra_cfg is not None:
            record = Path(result.hydra_cfg.hydra.runtime.output_dir) / RECORD
            if record.exists() and read_json(record, dict)["status"] == "failed":
                raise RuntimeError(f"the job failed, see {record}")  # so that SLURM sees it, too
        if self.requeued:  # SLURM's SIGTERM came before submitit had ended this process: what counts is the next start
            raise SystemExit(128 + signal.SIGTERM)
        return result

    def checkpoint(self) -> Any:
        """Called by submitit before it requeues: the job resumes from its own checkpoint."""
        from submitit.helpers import DelayedSubmission

        self.requeued = True
        return DelayedSubmission(SubmittedJob(self.job))


def _submitit_result(task: "submitit.Job[Any]", seconds: float = 5.0) -> Any:
    """The result of a job that is over; a shared file system may show it some seconds later."""
    from submitit.core.utils import FailedJobError

    until = time.monotonic() + seconds
    while not task.paths.result_pickle.exists() and time.monotonic() < until:
        time.sleep(0.5)
    if not task.paths.result_pickle.exists():
        state, code = _slurm_state(task.job_id)
        number = int(code.partition(":")[2] or 0) or int(code.partition(":")[0] or 0) - 128
        name = f", killed by {signal.Signals(number).name}" if number in [*signal.Signals] else ""
        return f"SLURM job {task.job_id} ended without a result: state {state}{name}, see {task.paths.stdout}"
    try:
        return task.result()
    except FailedJobError as error:  # which holds the traceback
        lines = [line for line in str(error).split("-" * 22)[1].splitlines() if line.strip()]
        return f"{lines[-1]}, see {task.paths.stdout}"


def _slurm_state(number: str) -> tuple[str, str]:
    """State and exit code ("1:0": code and signal), of the accounting if there is one, else of the controller."""
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=State,ExitCode", f"--jobs={number}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and "|" in done.stdout:
            state, _, code = done.stdout.splitlines()[-1].partition("|")
            return state, code
    except OSError:
        pass
    told = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True).stdout
    fields = dict(word.partition("=")[::2] for word in told.split() if "=" in word)
    return fields.get("JobState", "unknown"), fields.get("ExitCode", "")

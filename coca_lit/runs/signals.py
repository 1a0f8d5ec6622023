"""SLURM's warning that the time of a job is nearly over (`#SBATCH --signal=USR1@120`), from the first moment on.

During training `coca_lit.callbacks.preemption` saves first. Before that there is nothing to save, and the signal would
end a process that is still importing packages, and the job with it.
"""

import logging
import os
import signal
import subprocess
import sys
from types import FrameType

log = logging.getLogger(__name__)


def slurm_signal() -> int | None:
    """The number of the signal by which SLURM announces the end of a job; None outside SLURM."""
    return getattr(signal, "SIGUSR1", None) if "SLURM_JOB_ID" in os.environ else None


def requeue_while_starting() -> None:
    """Answers the signal until training listens: the job is requeued, and SLURM ends it."""
    if (number := slurm_signal()) is not None:
        signal.signal(number, requeue_once)


def requeue_once(number: int, frame: FrameType | None) -> None:
    """The handler of that time."""
    signal.signal(number, signal.SIG_IGN)
    if os.environ.get("SLURM_PROCID", "0") == "0":
        requeue()


def requeue() -> None:
    """Asks SLURM to run this job again under its number; called by one process of it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        problem = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        log.warning("could not requeue job %s (%s): submit it again by hand, it will resume", job, problem)
    else:
        print(f"requeued job {job}", file=sys.stderr, flush=True)

"""What a run knows from those who launched its processes, torchrun or srun: a name that all of them agree on, which of
them is the first, how many there are.
"""

import hashlib
import os
import re
import time

from coca_lit.errors import ConfigError
from coca_lit.runs.redaction import redact

LONGEST = 150  # characters; file systems take 255 bytes


def run_id() -> str:
    """What tells this run from others of its experiment: the launcher's number for it, else the time.

    Processes that start on their own read the clock at different moments, so they cannot name a folder after it. A
    SLURM job keeps its number when it is requeued, so it finds its checkpoints again.

    Raises:
        ConfigError: there are several processes and nothing that they have in common.
    """
    env = os.environ
    if _under_srun():
        step = env["SLURM_STEP_ID"]
        return f"slurm_{env['SLURM_JOB_ID']}" + (f"_{step}" if step != "0" else "")
    rendezvous = env.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's own default is "none"
    if rendezvous != "none":
        return f"torchrun_{rendezvous}"
    if int(env.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "the processes cannot agree on a name for the run folder: give one, name=my_run, "
            "or let torchrun do it, --rdzv-backend=c10d --rdzv-id=my_run"
        )
    return time.strftime("%Y-%m-%d_%H-%M-%S")


def launched_devices() -> int | str:
    """Processes per machine; "auto" if nobody launched them and Lightning may."""
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun, also within a SLURM job
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if _under_srun():
        return int(os.environ.get("SLURM_NTASKS_PER_NODE", int(os.environ["SLURM_NTASKS"]) // launched_nodes()))
    return "auto"


def launched_nodes() -> int:
    """Machines that the processes run on."""
    if "GROUP_WORLD_SIZE" in os.environ:
        return int(os.environ["GROUP_WORLD_SIZE"])
    return int(os.environ.get("SLURM_NNODES", "1")) if _under_srun() else 1


def _under_srun() -> bool:
    """Not merely within an allocation, where a shell may start any number of runs. Names are those of Lightning."""
    return "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def is_first_process() -> bool:
    """Whether this is rank 0, as far as the environment tells before there is a process group."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def job_folder(overrides: str) -> str:
    """A folder name for a job of a sweep that changes `overrides`: "data.root=/x,seed=1" -> "data.root=_x,seed=1"."""
    name = re.sub(r"[^\w.,=+~@-]+", "_", redact(overrides)) or "job"
    if len(name) <= LONGEST:
        return name
    return f"{name[:LONGEST]}_{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"

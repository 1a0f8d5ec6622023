"""What the environment tells a process that torchrun or srun launched: a name for the run that all processes agree on,
and how many there are. And where a process, and those that it starts, import modules from.
"""

import hashlib
import io
import os
import re
import sys
import time
from collections.abc import Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coca_lit.errors import ConfigError
from coca_lit.machine import is_first_process
from coca_lit.runs.redaction import redact

RUN_ID = "COCA_LIT_RUN_ID"  # tells the processes that Lightning starts
LONGEST = 150  # bytes; file systems take 255, with the parts that are added


def run_id() -> str:
    """The part of a run's name that distinguishes it from other runs of its experiment: the launcher's number, or else
    the time.

    Processes that start independently read the clock at different moments, so they cannot name a folder after it. A
    SLURM job keeps its number when it is requeued, so it finds its checkpoints.

    Raises:
        ConfigError: there are several processes and nothing that they have in common.
    """
    env = os.environ
    if under_srun():
        step = env["SLURM_STEP_ID"]
        return f"slurm_{env['SLURM_JOB_ID']}" + (f"_{step}" if step != "0" else "")
    rendezvous = env.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's own default is "none"
    if rendezvous != "none":
        return f"torchrun_{rendezvous}"
    if int(env.get("WORLD_SIZE", "1")) > 1:
        parent, _, name = env.get(RUN_ID, "").partition(" ")
        if parent in (str(os.getppid()), str(os.getpid())):  # of this process: Lightning asks again in a sweep
            return name
        raise ConfigError(
            "the processes cannot agree on a name for the run folder: set name=my_run, "
            "or let torchrun name it with --rdzv-backend=c10d --rdzv-id=my_run"
        )
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    env[RUN_ID] = f"{os.getpid()} {now}"
    return now


def launched_devices() -> int | str:
    """Processes per machine; "auto" where Lightning launches them itself."""
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun, also within a SLURM job
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if under_srun():
        tasks = int(os.environ["SLURM_NTASKS"])
        nodes = launched_nodes()
        if tasks % nodes:
            raise ConfigError(
                f"srun started {tasks} tasks on {nodes} nodes, which get unequal numbers of them: "
                "use --ntasks-per-node in place of --ntasks"
            )
        return tasks // nodes  # not SLURM_NTASKS_PER_NODE, which may describe the allocation
    return "auto"


def launched_nodes() -> int:
    """Number of machines that the processes run on."""
    if "GROUP_WORLD_SIZE" in os.environ:
        return int(os.environ["GROUP_WORLD_SIZE"])
    return int(os.environ.get("SLURM_NNODES", "1")) if under_srun() else 1


def launched_processes() -> int:
    """Number of processes that torchrun or srun started; 1 where Lightning launches them itself."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1") if under_srun() else "1"))


def under_srun() -> bool:
    """Under srun, and not merely in an allocation, where a shell may start any number of runs. Lightning tells an
    interactive job by the same names.
    """
    return "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def announce(command: str) -> None:
    """The first line of a command on a terminal, before the seconds that its config and libraries take."""
    if sys.stderr.isatty() and is_first_process():
        print(f"{command}: starting …", file=sys.stderr, flush=True)


def print_any_text() -> None:
    """Lets output go on where its encoding lacks a character, as in a file that Windows writes as cp1252; names of
    files that are not Unicode are printed byte for byte. Errors are printed so anyway.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        every = sys.stdout.encoding.lower().startswith("utf")
        sys.stdout.reconfigure(errors="surrogateescape" if every else "backslashreplace")


def job_folder(overrides: str) -> str:
    """A folder name for a job of a sweep that changes `overrides`: "lr=0.1,seed=1", or "root=_x_1a2b3c4d" with a digest
    where a name cannot hold them.
    """
    plain = re.sub(r"(^|,)\+\+", r"\1", redact(overrides)) or "job"
    name = re.sub(r"[^\w.,=+~@-]+", "_", plain)
    if name == plain and len(name.encode()) <= LONGEST:
        return name
    start = name.encode()[:LONGEST].decode(errors="ignore")
    return f"{start}_{hashlib.sha256(plain.encode()).hexdigest()[:8]}"  # a/b and a_b are told apart


def isolate() -> None:
    """Processes that this one starts import modules from where it does. Python would put the folder first that they are
    started in, and there may be anybody's files: photos, shards, a page's downloads.
    """
    main = sys.modules["__main__"]
    checkout = Path(__file__).parents[2]
    script = getattr(main, "__file__", None) if getattr(main, "__spec__", None) is None else None
    folders = [Path(script).resolve().parent] if script else [checkout] if (checkout / "conf").is_dir() else []
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*map(str, folders), *filter(None, given)]))
    os.environ["PYTHONSAFEPATH"] = "1"


class _NamedModules(MetaPathFinder):
    """Finds modules of these names, and no others, in a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.names: set[str] = set()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [self.folder]) if fullname in self.names else None


def import_from_current_folder(modules: Iterable[str]) -> None:
    """Lets a config name code in the folder that the command was started from, after all that is installed: if it names
    a module that nobody else has. Configs are code, and whoever runs a config runs what it names. Nothing else in that
    folder is imported, neither by these modules nor by a library that looks for an optional package.
    """
    names = {str(module).partition(".")[0] for module in modules}
    missing = {name for name in names if name.isidentifier() and name not in sys.modules and find_spec(name) is None}
    if not missing:
        return
    folder = os.getcwd()
    finders = [finder for finder in sys.meta_path if isinstance(finder, _NamedModules) and finder.folder == folder]
    finder = finders[0] if finders else _NamedModules(folder)
    if not finders:
        sys.meta_path.append(finder)
    finder.names |= missing

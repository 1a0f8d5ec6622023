"""Process-wide settings of PyTorch and Lightning: threads, memory, precision, and which notices are shown."""

import logging
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coca_lit.errors import ConfigError, DataError
from coca_lit.files import write_waiting

TRIES, PAUSE = 10, 30  # to write the scores on a full disk, and seconds between two tries


def configure_libraries(threads: int | None, fast_kernels: bool = True) -> None:
    """
    Args:
        threads: of PyTorch on the CPU; None for its own choice.
        fast_kernels: see `coca_lit.models.kernels`.
    """
    import torch

    from coca_lit.models import kernels

    if threads is not None:
        if not isinstance(threads, int) or threads < 1:
            raise ConfigError(f"threads must be a whole number of at least 1, got {threads!r}")
        torch.set_num_threads(threads)
    kernels.enable(fast_kernels)
    kernels.keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    # Lightning's notices would drown ours. Its warnings stay, except those that call for no action.
    for name in ("lightning.pytorch", "lightning.fabric"):
        lightning_log = logging.getLogger(name)
        lightning_log.setLevel(logging.WARNING)
        lightning_log.propagate = False
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # frozen parts: on purpose
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # no validation set


def best_precision() -> str:
    """bf16 mixed precision where the device computes it in hardware, else fp32."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() else "32-true"


def finish_run(
    folder: Path, results: dict[str, float], not_run: dict[str, str], seen: dict[str, int] | None = None
) -> None:
    """Prints the scores of a run, and writes them and its report; arguments as for `write_results`. On a full disk it
    tries again for some minutes.

    Raises:
        DataError: they cannot be written.
    """
    from coca_lit.report.page import write_report
    from coca_lit.runs.run_folder import print_results, write_results

    print_results(results)
    for left in reversed(range(TRIES)):
        try:
            write_waiting()
            seconds = write_results(folder, results, not_run, seen)
            write_report(folder)
            break
        except (DataError, OSError) as error:
            if not left:
                raise DataError(f"{error}: make room; the same command then scores again and writes them") from error
            print(f"{error}; trying again in {PAUSE} seconds", flush=True)
            time.sleep(PAUSE)
    print(f"{seconds} seconds; everything is in {folder}, to be seen in report.html", flush=True)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Says in one sentence that a data worker was killed. PyTorch raises that wherever the main process just is.

    Raises:
        DataError: in place of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.search(
            r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)(?: is)? (killed by signal: \w+|exited)", str(error)
        )
        if found is None:
            raise
        raise DataError(
            f"a data worker (process {found[1]}) {'was ' * found[2].startswith('killed')}{found[2]}: most often the "
            "memory is full, so take fewer workers (data.num_workers, scoring.workers); the same command resumes"
        ) from error

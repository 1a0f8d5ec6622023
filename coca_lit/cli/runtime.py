"""What commands share: settings of PyTorch and Lightning (threads, memory, precision, which notices are shown), the
model of a command that names none, and the end of a run.
"""

import logging
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coca_lit.errors import ConfigError, DataError
from coca_lit.files import write_waiting

if TYPE_CHECKING:
    import torch

    from coca_lit.metrics.uncertainty import Draws

TRIES, PAUSE = 10, 30  # to write the scores on a full disk, and seconds between two tries
BUILTIN = "builtin"  # as a checkpoint: the demo model, which learned the built-in scenes
OUTPUTS = Path("outputs")


def configure_libraries(threads: int | None, fast_kernels: bool = True, tf32: bool = False) -> None:
    """Sets up PyTorch, and quietens Lightning.

    Args:
        threads: of PyTorch on the CPU; None for its own choice.
        fast_kernels: see `coca_lit.models.kernels`.
        tf32: let GPUs round the inputs of fp32 products to 10 bits, as a training may; scores are exact.
    """
    import torch

    from coca_lit.models import kernels

    if threads is not None:
        if not isinstance(threads, int) or threads < 1:
            raise ConfigError(f"threads must be a whole number of at least 1, got {threads!r}")
        torch.set_num_threads(threads)
    kernels.enable(fast_kernels)
    kernels.keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    # Lightning's notices would drown ours. Its warnings stay, except those that call for no action.
    for name in ("lightning.pytorch", "lightning.fabric"):
        lightning_log = logging.getLogger(name)
        lightning_log.setLevel(logging.WARNING)
        lightning_log.propagate = False
    profilers = logging.getLogger("lightning.pytorch.profilers")  # whose table is what trainer.profiler=simple is for
    profilers.setLevel(logging.INFO)
    profilers.handlers, profilers.propagate = [logging.StreamHandler(sys.stdout)], False
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # frozen parts: on purpose
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback")  # with whole weights only
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # no validation set
    # Strides of 1 × 1 convolutions, which have several names for one layout
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", message=".*logging on epoch level in distributed")  # scores are the same there


def best_precision() -> str:
    """bf16 mixed precision where the device computes it in hardware, else fp32."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() else "32-true"


def chosen_dtype(precision: str) -> "torch.dtype":
    """The type of the weights of a command that trains nothing: fp32, bf16, or auto for bf16 where it is fast."""
    import torch

    known = {"fp32": torch.float32, "bf16": torch.bfloat16}
    known["auto"] = known["bf16" if best_precision() == "bf16-mixed" else "fp32"]
    if precision not in known:
        raise ConfigError(f"precision must be auto, fp32 or bf16, not '{precision}'")
    return known[precision]


def chosen_checkpoint(checkpoint: str | None, smaller: str = "coca_ViT-B-32") -> str:
    """The checkpoint of a command as it is given, or what stands in for it: a released model if there is none, the
    model of the built-in scenes for `BUILTIN`. Standard error says which one and where it is kept.

    Args:
        smaller: the released model to recommend where the default one is too large.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    from coca_lit.distributed import rank
    from coca_lit.weights.hub import DEFAULT, released

    if checkpoint == BUILTIN:
        return str(_builtin_model())
    if checkpoint is not None:
        return str(checkpoint)
    size, small = (model.gigabytes for name in (DEFAULT, smaller) if (model := released(name)))
    if rank() == 0:
        print(
            f"no checkpoint given: this is {DEFAULT}, OpenCLIP's CoCa finetuned on MSCOCO, {size} GB, kept in"
            f" {HF_HUB_CACHE}; a smaller one: checkpoint={smaller} ({small} GB)",
            file=sys.stderr,
        )
    return DEFAULT


def _builtin_model() -> Path:
    """The checkpoint of the built-in demo model, trained now if no run has left one."""
    from coca_lit.demo.builtin import find_demo_model, train_demo_model

    if found := find_demo_model(OUTPUTS):
        print(f"the built-in demo model is {found}", file=sys.stderr)
        return found
    print(f"there is no finished demo run in {OUTPUTS}: training the demo model, a few minutes", file=sys.stderr)
    return train_demo_model(OUTPUTS)


def finish_run(
    folder: Path,
    results: dict[str, float],
    not_run: dict[str, str],
    draws: "dict[str, Draws] | None" = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Prints the scores of a run with their uncertainty, and writes them and its report; see `write_results`. On a full
    disk it tries again for some minutes.

    Raises:
        DataError: they cannot be written.
    """
    from coca_lit.report.page import write_report
    from coca_lit.report.tables import print_scores
    from coca_lit.runs.draws import write_draws
    from coca_lit.runs.run_folder import write_results

    print_scores(results, draws or {})
    for left in reversed(range(TRIES)):
        try:
            write_waiting()
            write_draws(folder, draws or {})
            seconds = write_results(folder, results, not_run, facts)
            write_report(folder)
            break
        except (DataError, OSError) as error:
            if not left:
                raise DataError(f"{error}: make room; the same command then scores again and writes them") from error
            print(f"{error}; trying again in {PAUSE} seconds", flush=True)
            time.sleep(PAUSE)
    print(f"{seconds} seconds; everything is in {folder}; open report.html there", flush=True)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Says in one sentence that a data worker was killed. PyTorch raises that wherever the main process just is, or a
    connection breaks while the worker hands over a batch.

    Raises:
        DataError: in place of that error.
    """
    try:
        yield
    except (RuntimeError, EOFError, OSError) as error:
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal|exited)", str(error))
        handed_over = any(frame.name == "rebuild_storage_fd" for frame in traceback.extract_tb(error.__traceback__))
        if found is None and not handed_over:
            raise
        which = f" (process {found[1]})" if found is not None else ""
        raise DataError(
            f"a data worker{which} ended or was killed, usually because memory ran out: use fewer workers "
            "(data.num_workers, scoring.workers); the same command resumes"
        ) from error

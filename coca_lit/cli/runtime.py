"""Process-wide settings of PyTorch and Lightning: threads, memory, precision, and which notices are shown."""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coca_lit.errors import ConfigError

if TYPE_CHECKING:
    from coca_lit.metrics.uncertainty import Draws


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
    folder: Path,
    results: dict[str, float],
    not_run: dict[str, str],
    draws: "dict[str, Draws] | None" = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Writes and prints the scores of a run with their uncertainty, and writes its report; see `write_results`."""
    from coca_lit.report.page import write_report
    from coca_lit.report.tables import print_scores
    from coca_lit.runs.draws import write_draws
    from coca_lit.runs.run_folder import write_results

    write_draws(folder, draws or {})
    seconds = write_results(folder, results, not_run, facts)
    print_scores(results, draws or {})
    write_report(folder)
    print(f"{seconds} seconds; everything is in {folder}, to be seen in report.html", flush=True)

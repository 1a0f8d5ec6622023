"""Settings of PyTorch and Lightning that commands share: threads, memory, precision, which notices are shown."""

import atexit
import gc
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from coca_lit.errors import ConfigError, error_context
from coca_lit.machine import best_device, processors

if TYPE_CHECKING:
    import lightning.pytorch as L
    import torch

    from coca_lit.models.kernels.process import Fp32Matmul

NO_ACTION = (  # how warnings begin that call for none
    ".*treespec, LeafSpec.*",
    r"Found \d+ module\(s\) in eval mode",  # frozen parts: on purpose
    ".*smaller than the logging interval",
    "You're using the WeightAveraging callback",  # with whole weights only
    "Total length of `list` across ranks is zero",  # no validation set
    "Grad strides do not match bucket view strides",  # of 1 × 1 convolutions, which have several names for one layout
    ".*logging on epoch level in distributed",  # scores are the same there
)


def keep_imports() -> None:
    """Collects garbage again, but not in what has been imported so far: it stays."""
    gc.freeze()
    gc.enable()
    if "triton" in sys.modules:  # which reports whatever Python has not collected at its end as leaked; takes a second
        atexit.register(gc.unfreeze)


def configure_libraries(threads: int | None, fast_kernels: bool = True, tf32: bool = False) -> None:
    """Sets up PyTorch, and quietens Lightning.

    Args:
        threads: of PyTorch on the CPU; None for its own choice, within the cores that this process may use.
        fast_kernels: see `coca_lit.models.kernels`.
        tf32: let GPUs round the inputs of fp32 products to 10 bits, as a training may; scores are exact.
    """
    import torch

    from coca_lit.models import kernels

    if not gc.isenabled():
        keep_imports()
    if threads is not None:
        if not isinstance(threads, int) or threads < 1:
            raise ConfigError(f"threads must be a whole number of at least 1, got {threads!r}")
        torch.set_num_threads(threads)
    elif processors() < torch.get_num_threads():  # PyTorch does not know of a container's limit
        torch.set_num_threads(processors())
    kernels.enable(fast_kernels)
    kernels.keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    # Lightning's notices would drown ours. Its warnings stay, but for `NO_ACTION`.
    for name in ("lightning.pytorch", "lightning.fabric"):
        lightning_log = logging.getLogger(name)
        lightning_log.setLevel(logging.WARNING)
        lightning_log.propagate = False
    profilers = logging.getLogger("lightning.pytorch.profilers")  # whose table is what trainer.profiler=simple is for
    profilers.setLevel(logging.INFO)
    profilers.handlers = [logging.StreamHandler(sys.stdout)]
    profilers.propagate = False
    for message in NO_ACTION:
        warnings.filterwarnings("ignore", message=message)
    # Outside of an allocation a machine merely has SLURM installed.
    allocated = "SLURM_JOB_ID" in os.environ
    warnings.filterwarnings("once" if allocated else "ignore", message="The `srun` command is available on your system")


def best_precision(device: str) -> str:
    """bf16 mixed precision where the device computes it in hardware, else fp32."""
    import torch

    computes_bf16 = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "mps": lambda: False,  # not measured there
        "cpu": getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False),
    }
    return "bf16-mixed" if computes_bf16[device]() else "32-true"


def chosen_dtype(precision: str) -> "torch.dtype":
    """The type of the weights of a command that trains nothing: fp32, bf16, or auto for bf16 where it is fast."""
    import torch

    known = {"fp32": torch.float32, "bf16": torch.bfloat16}
    known["auto"] = known["bf16" if best_precision(best_device()) == "bf16-mixed" else "fp32"]
    if precision not in known:
        raise ConfigError(f"precision must be auto, fp32 or bf16, not '{precision}'")
    return known[precision]


def choose_fp32_matmul(trainer: "L.Trainer", module: "L.LightningModule", library: "Fp32Matmul") -> None:
    """Chooses the library that multiplies fp32 matrices on the CPU, and prints it: the one that is named, or for "auto"
    the faster one for a model of this size, if the run computes in fp32 on the CPU. A run that resumes has that of its
    checkpoint, see `Checkpoints`.

    Args:
        library: mkl, onednn or auto.
    """
    from coca_lit.distributed import print_rank_zero
    from coca_lit.models import kernels

    fp32_on_cpu = trainer.strategy.root_device.type == "cpu" and trainer.precision == "32-true"
    if fp32_on_cpu or library != "auto":
        with error_context("kernels"):
            chosen = kernels.use_fp32_matmul(library, sum(p.numel() for p in module.parameters()))
        print_rank_zero(f"fp32_matmul: {chosen}")

"""Shared by the side-by-side benchmarks: interleaved timing, peak memory, OpenCLIP's models with the same weights.

Times are CPU seconds of the process with one thread, so that other load on the machine disturbs them little. Variants
take turns (A B C A B C …) and ratios are taken turn by turn, so that a slow minute hits both sides.
"""

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from coca_lit.models import CoCa
from coca_lit.weights.open_clip import from_open_clip

PROCESS = Path("/proc/self")  # peak memory is read there, so this runs on Linux only
CONTEXT = 76

T = TypeVar("T")


class Ratio(NamedTuple):
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def interleaved(variants: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """CPU seconds of each variant, turn by turn, after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repetitions + 1):
        for name, function in variants.items():
            gc.collect()
            start = time.process_time()
            function()
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> Ratio:
    pairs = [a / b for a, b in zip(slow, fast, strict=True)]
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))


def in_own_process(function: Callable[..., T], *arguments: object) -> T:
    """The result of a call in a fresh process, so peak memory and allocator carry nothing over from earlier calls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_memory(function: Callable[[], object]) -> float:
    """MiB that `function` needs at its peak above what the process holds now; call it once before, to warm up."""
    forget_peak()
    before = memory("VmRSS")
    function()
    return memory("VmHWM") - before


def forget_peak() -> None:
    """Returns unused memory to the system and resets the peak of the process."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    PROCESS.joinpath("clear_refs").write_text("5")


def memory(name: str) -> float:
    """MiB of the process: VmRSS now, VmHWM at its peak."""
    status = dict(line.split(":", 1) for line in PROCESS.joinpath("status").read_text().splitlines())
    return int(status[name].split()[0]) / 1024


def open_clip_model(name: str) -> Any:  # OpenCLIP has no types
    """OpenCLIP's model with random weights."""
    import open_clip  # here, so that it takes no memory of processes that do not use it

    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False)
    if hasattr(model, "text_decoder"):
        nn.init.normal_(model.text_decoder.text_projection, std=512**-0.5)  # OpenCLIP leaves it uninitialised
    return model


def same_weights(theirs: nn.Module) -> CoCa:
    return from_open_clip({name: tensor.clone() for name, tensor in theirs.state_dict().items()})


def caption_batch(batch: int, *, full: int = 0, image_size: int = 224) -> tuple[Tensor, Tensor]:
    """Normalised random images (B, 3, H, W), and texts (B, 76) padded with 0, of which `full` fill the context.

    Words per caption ~ Gamma(shape 6, mean 12), as long as COCO's, with start and end token added.
    """
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    words = torch.distributions.Gamma(6.0, 0.5).sample((batch,)).round().long().clamp(4, CONTEXT - 2)
    words[:full] = CONTEXT - 2
    texts = torch.zeros(batch, CONTEXT, dtype=torch.long)
    for text, count in zip(texts, words.tolist(), strict=True):
        text[0], text[count + 1] = 49406, 49407
        text[1 : count + 1] = torch.randint(1, 49000, (count,), generator=generator)
    return torch.randn(batch, 3, image_size, image_size, generator=generator), texts

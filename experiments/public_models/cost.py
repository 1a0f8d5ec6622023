"""What a public model costs on a CPU: loading, captioning, scoring. Random weights of true shapes, in OpenCLIP's file.

OMP_NUM_THREADS=1 python experiments/public_models/cost.py mammut_ViT-S-32 coca_ViT-B-32

Seconds are those of the CPU in one thread, which other programs on the machine change little.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coca_lit.models import create_model
from coca_lit.models.cost import forward_flops
from coca_lit.weights.load import load_model
from coca_lit.weights.open_clip import to_open_clip
from experiments.benchmarks.record import record

TEXT = "a brown dog jumps over a fallen tree in the snow, and two children in red coats watch it from a bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="presets")
    parser.add_argument("--images", type=int, default=4, help="in a batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        record(Path(__file__).with_name("results.csv"), [cost(name, options.images)])


@torch.no_grad()
def cost(name: str, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = write_random(name, Path(folder))
        size = path.stat().st_size
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins here
        seconds, model = timed(lambda: load_model(path))
    pixels = torch.randint(256, (count, 3, model.image_size, model.image_size), dtype=torch.uint8)
    tokens = model.tokenizer([TEXT] * count)
    model.encode_image(pixels[:1])  # the first call builds kernels
    speeds = {
        "captions/s": count / timed(lambda: model.generate(pixels, min_length=29))[0],
        "images/s": count / timed(lambda: model.encode_image(pixels))[0],
        "texts/s": count / timed(lambda: model.encode_text(tokens))[0],
    }
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    return {
        "model": name,
        "parameters, M": sum(p.numel() for p in model.parameters()) / 1e6,
        "GFLOP per pair": forward_flops(model) / 1e9,
        "file, GB": size / 1e9,
        "loading, s": seconds,
        **speeds,
        "peak memory, GB": int(peak) * 1024 / 1e9,
    }


def write_random(name: str, folder: Path) -> Path:
    """A checkpoint of OpenCLIP's training without its optimizer."""
    torch.manual_seed(0)
    model = create_model(name)
    state = to_open_clip(model, "mammut" if name.startswith("mammut_") else "4")
    path = folder / "epoch_1.pt"
    torch.save({"epoch": 1, "name": name, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return path


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the CPU, and the result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


if __name__ == "__main__":
    main()

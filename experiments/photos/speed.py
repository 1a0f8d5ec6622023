"""Photos per second of `coca-caption` with the package's own model.

python experiments/photos/speed.py FLICKR8K_IMAGES --count 256
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from coca_lit.tools.caption.captioner import caption_units
from coca_lit.tools.caption.inputs import find_images, find_inputs
from coca_lit.tools.caption.outputs import open_writer
from coca_lit.weights.load import load_model
from experiments.benchmarks.record import record

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam search, the default": {"strategy": "beam"},
    "four beams": {"strategy": "beam", "num_beams": 4, "length_penalty": 1.2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=256, help="photos")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    units = find_inputs([str(path) for path in find_images(options.folder)[: options.count]], 32)
    model = load_model("photos").to(torch.bfloat16 if options.precision == "bf16" else torch.float32)
    rows = []
    for captions, generate in CASES.items():
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            totals = caption_units(model, units, open_writer(f"{folder}/captions.jsonl", units, {}), generate)
        rows.append(
            {
                "captions": captions,
                "precision": options.precision,
                "threads": torch.get_num_threads(),
                "photos": totals.images,
                "photos/s": totals.images / totals.seconds,
                "processes that wanted a core": load,
            }
        )
    record(Path(__file__).with_suffix(".csv"), rows)


if __name__ == "__main__":
    main()

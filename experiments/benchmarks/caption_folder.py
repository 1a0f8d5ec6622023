"""How much of its time `coca-caption` spends inside the model on a folder of photos: the aim is 80 %, with reading,
decoding and writing hidden behind it.

    python experiments/benchmarks/caption_folder.py data/flickr8k/images --count 1000

Weights are random, as the time does not depend on them: no caption ends early, all 30 tokens are written.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from coca_lit.models import CoCa, create_model
from coca_lit.tools.caption.captioner import caption_units
from coca_lit.tools.caption.inputs import find_images, find_inputs
from coca_lit.tools.caption.outputs import open_writer
from coca_lit.weights.load import load_model
from experiments.benchmarks.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of coca-caption on a folder, and the model's share of it.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="photos")
    parser.add_argument("--model", default="coca_vit_b32", help="a preset, or photos")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--strategy", nargs="+", choices=("greedy", "beam"), default=["beam"])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="processes that decode")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    photos = [str(path) for path in find_images(args.folder)[: args.count]]
    torch.manual_seed(0)
    made = load_model("photos") if args.model == "photos" else create_model(args.model).eval()
    model = made.to("cuda" if torch.cuda.is_available() else "cpu")
    for precision in args.precision:
        model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        for strategy in args.strategy:
            for workers in args.workers:
                case = {"model": args.model, "precision": precision, "strategy": strategy, "batch": args.batch}
                record(Path(__file__).with_suffix(".csv"), [case | run(model, photos, strategy, args.batch, workers)])


def run(model: CoCa, photos: list[str], strategy: str, batch: int, workers: int) -> dict[str, float]:
    units = find_inputs(photos, batch)
    options = {"strategy": strategy, "min_length": min(30, model.tokenizer.context_length) - 1}
    with tempfile.TemporaryDirectory() as folder:
        writer = open_writer(f"{folder}/captions.jsonl", units, {})
        totals = caption_units(model, units, writer, options, batch, workers)
    rate = totals.images / totals.seconds
    return {
        "workers": workers,
        "images": totals.images,
        "images/s": rate,
        "inside the model": totals.model_share,
    }


if __name__ == "__main__":
    main()

"""Scores of captions chosen among candidates by likelihood, by similarity to the image, or by a mixture.

    python experiments/contrastive_reranking/weights.py scenes CHECKPOINT --candidates 8
    python experiments/contrastive_reranking/weights.py flickr8k CHECKPOINT --root FOLDER_OF_FLICKR8K

The candidates of an image are written once; each weight then chooses among them as `generate(rerank="contrastive")`
does. Rows are added to the CSV; rows of the same data, model, seed and candidates are replaced. The run folder of the
checkpoint is named MODEL_seedN.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coca_lit.data.datasets.captions import flickr_records
from coca_lit.data.records import Record
from coca_lit.data.scenes.render import scene_records
from coca_lit.data.transforms import build_transform
from coca_lit.metrics.captions import caption_scores
from coca_lit.models import CoCa
from coca_lit.models.inputs import stack_images
from coca_lit.runs.run_folder import environment
from coca_lit.weights.load import load_model
from experiments.study import replace_rows

WEIGHTS = [i / 10 for i in range(11)]
BATCH = 64


def candidates(model: CoCa, records: Sequence[Record], strategy: str, count: int) -> tuple[Any, ...]:
    """Ids (I, N, L) of N captions for each image, their similarity and mean log-probability (I, N)."""
    options: dict[str, Any] = {"strategy": strategy, "num_captions": count, "rerank": "contrastive"}
    if strategy == "beam":
        options["num_beams"] = count
    else:
        options["generator"] = torch.Generator().manual_seed(0)
    transform, found = build_transform(size=model.image_size), []
    for start in range(0, len(records), BATCH):
        images = stack_images([transform(record.image()) for record in records[start : start + BATCH]])
        found.append(model.generate(images, return_scores=True, **options))
    return tuple(torch.cat(parts) for parts in zip(*(each[:4] for each in found), strict=True))


def scores(model: CoCa, records: Sequence[Record], ids: Tensor, similarities: Tensor) -> dict[str, float]:
    """Scores of one caption (I, L) for each image, whose similarity (I,) gives the model's own CLIPScore."""
    texts = [model.tokenizer.decode(row) for row in ids]
    references = {i: record.captions for i, record in enumerate(records)}
    found = caption_scores(references, dict(enumerate(texts)), metrics=["Bleu", "CIDEr"])
    exact = sum(text in record.captions for text, record in zip(texts, records, strict=True)) / len(records)
    return {
        "CIDEr": found["CIDEr"],
        "Bleu_4": found["Bleu_4"],
        "exact_match": exact,
        "own_CLIPScore": 2.5 * similarities.clamp(min=0).mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["scenes", "compositional", "flickr8k"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--root", type=Path, help="of Flickr8k")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"), help="the CSV")
    parser.add_argument("--images", type=int, help="score the first N only")
    args = parser.parse_args()
    model = load_model(args.checkpoint).eval()
    name, seed = args.checkpoint.resolve().parents[1].name.rsplit("_seed", maxsplit=1)
    if args.data == "flickr8k":
        records = flickr_records(args.root, "val")[: args.images]
    else:
        split = "val" if args.data == "scenes" else "compositional"
        records = scene_records(split, size=model.image_size)[: args.images]
    rows = []
    for strategy in ("beam", "sample"):
        start = time.time()
        ids, _, log_probs, similarities = candidates(model, records, strategy, args.candidates)
        seconds = round(time.time() - start)
        each = torch.arange(len(records))
        for weight in WEIGHTS:
            mixed = weight * model.logit_scale.exp().item() * similarities + (1 - weight) * log_probs
            best = mixed.argmax(dim=1)
            found = scores(model, records, ids[each, best], similarities[each, best])
            rows.append(
                {"data": args.data, "model": name, "seed": seed, "strategy": strategy, "candidates": args.candidates}
                | {"images": len(records), "weight": weight}
                | {metric: f"{value:.4f}" for metric, value in found.items()}
                | {"seconds": seconds, "commit": environment()["commit"]}
                | {"machine": environment()["machine"], "torch": torch.__version__}
            )
            print(rows[-1], flush=True)
    replace_rows(args.out, rows, by=("data", "model", "seed", "strategy", "candidates"))


if __name__ == "__main__":
    with torch.no_grad():
        main()

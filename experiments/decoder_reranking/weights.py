"""Recall after decoder re-ranking, for weights from 0 (embeddings alone) to 1 (the decoder alone).

    python experiments/decoder_reranking/weights.py scenes CHECKPOINT
    python experiments/decoder_reranking/weights.py flickr8k CHECKPOINT --root FOLDER_OF_FLICKR8K

The candidate pairs are scored once; each weight then combines the same scores, as `coca-evaluate scoring.rerank=16`
does. Rows are added to results.csv in this folder; rows of the same data and model are replaced.
"""

import argparse
import time
from pathlib import Path

import torch

from coca_lit.data.datasets.flickr import flickr_records
from coca_lit.data.scenes.render import scene_records
from coca_lit.evals.inference import embed_pairs
from coca_lit.evals.retrieval import candidate_pairs, log_likelihoods, reranked
from coca_lit.metrics.retrieval import recall_at_k
from coca_lit.runs.run_folder import environment
from coca_lit.weights.load import load_model
from experiments.study import read_rows, write_rows

WEIGHTS = [i / 10 for i in range(11)]
RESULTS = Path(__file__).with_name("results.csv")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["scenes", "compositional", "flickr8k"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--root", type=Path, help="of Flickr8k")
    parser.add_argument("--candidates", type=int, default=16, help="images that are read with each text")
    args = parser.parse_args()
    model = load_model(args.checkpoint).eval()
    if args.data == "flickr8k":
        records = flickr_records(args.root, "val")
    else:
        split = "val" if args.data == "scenes" else "compositional"
        records = scene_records(split, size=model.image_size)
    about = environment()
    rows = {"data": args.data, "model": args.checkpoint.resolve().parents[1].name, "candidates": str(args.candidates)}
    images, texts, image_of_text = embed_pairs(model, records)
    similarity = model.logit_scale.exp().item() * images @ texts.T
    start, likely = time.process_time(), candidate_pairs(similarity, args.candidates)
    read = log_likelihoods(model, records, likely)
    cost = {"pairs": str(int(likely.sum())), "CPU seconds": f"{time.process_time() - start:.0f}"}
    found = []
    for weight in WEIGHTS:
        recalls = recall_at_k(reranked(similarity, read, weight), image_of_text)
        found.append(
            rows
            | {"weight": str(weight), **{name: f"{value:.4f}" for name, value in recalls.items()}, **cost}
            | {name: str(about[name]) for name in ("commit", "machine", "torch")}
        )
        print(found[-1], flush=True)
    old = [row for row in read_rows(RESULTS) if any(row[name] != value for name, value in rows.items())]
    write_rows(RESULTS, [*old, *found])


if __name__ == "__main__":
    main()

"""Time and memory to rank 5,000 images × 25,010 texts in both directions; targets: 10 s on 2 cores, 2 GiB.

    python experiments/benchmarks/retrieval.py --width 512

Compared with CLIP_benchmark's own functions: all similarities at once, a top-k, a matrix of correct pairs. Embeddings
are random and of unit length, each text near its image; the recalls of both must agree. Each runs in its own process,
because peak memory is that of a process; it is read on Linux only.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from coca_lit.metrics.retrieval import feature_ranks
from experiments.benchmarks.harness import in_own_process, peak_memory
from experiments.benchmarks.record import record

KS = (1, 5, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of retrieval scores.")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--texts", type=int, default=25_010)
    parser.add_argument("--width", type=int, default=512, help="of the features")
    arguments = parser.parse_args()
    size = (arguments.images, arguments.texts, arguments.width)
    case = f"{arguments.images} x {arguments.texts}, width {arguments.width}, {torch.get_num_threads()} threads"
    rows, found = [], {}
    for way in ("coca_lit", "clip_benchmark"):
        seconds, megabytes, found[way] = in_own_process(measure, way, *size)
        rows.append({"case": case, "way": way, "seconds": seconds, "extra peak MB": megabytes, **found[way]})
    for name, value in found["clip_benchmark"].items():
        assert abs(found["coca_lit"][name] - value) < 1e-6, name
    record(Path(__file__).with_suffix(".csv"), rows)


def measure(way: str, images: int, texts: int, width: int) -> tuple[float, float, dict[str, float]]:
    """Seconds, peak memory beyond that of the features in MB, and the recalls."""
    image_features, text_features, image_of_text = features(images, texts, width)
    score = {"coca_lit": coca_lit_scores, "clip_benchmark": clip_benchmark_scores}[way]
    scores: dict[str, float] = {}
    start = time.monotonic()
    megabytes = peak_memory(lambda: scores.update(score(image_features, text_features, image_of_text)))
    seconds = time.monotonic() - start
    return seconds, megabytes, {name: value for name, value in scores.items() if "recall" in name}


def features(images: int, texts: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Five texts for each image, and one more for the first few."""
    torch.manual_seed(0)
    image_of_text = (torch.arange(texts) % images).sort().values
    image_features = torch.randn(images, width)
    text_features = image_features[image_of_text] + 12 * torch.randn(texts, width)
    return normalize(image_features, dim=1), normalize(text_features, dim=1), image_of_text


def coca_lit_scores(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> dict[str, float]:
    return feature_ranks(image_features, text_features, image_of_text).recalls()


def clip_benchmark_scores(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> dict[str, float]:
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = text_features @ image_features.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), image_of_text] = True
    found = {}
    for name, similarity, right in (("t2i", scores, positive), ("i2t", scores.T, positive.T)):
        for k in KS:
            hits = batchify(recall_at_k, similarity, right, 64, "cpu", k=k) > 0
            found[f"{name}_recall@{k}"] = hits.float().mean().item()
    return found


if __name__ == "__main__":
    main()

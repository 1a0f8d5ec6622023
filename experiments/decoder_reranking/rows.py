"""What the decoder adds to a trained model, for weights from 0 (embeddings alone) to 1 (the decoder alone).

    python experiments/decoder_reranking/rows.py scenes CHECKPOINT
    python experiments/decoder_reranking/rows.py flickr8k CHECKPOINT --root FOLDER_OF_FLICKR8K --counts 2 4 8 16

- Recall after re-ranking, as `coca-evaluate scoring.rerank=N` does it, for some numbers N of candidates.
- The same time spent otherwise: recall of embeddings that are averaged over N views of each image, until they take
  longer than the most candidates.
- Scenes: the choice between a right and a wrong text, by log p(text | image) and by log p(text | image) - log p(text).

Rows are added to a CSV; rows of the same data and model are replaced.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from torchvision.transforms.functional import to_pil_image

from coca_lit.data.datasets.captions import flickr_records
from coca_lit.data.records import Record
from coca_lit.data.scenes.render import scene_records
from coca_lit.data.transforms import RandomCrop, load_pixels
from coca_lit.evals import inference
from coca_lit.evals.inference import blind_log_likelihoods, embed_images, embed_pairs
from coca_lit.evals.retrieval import candidate_log_likelihoods, candidate_pairs, informative, mix_scores
from coca_lit.metrics.retrieval import recall_at_k
from coca_lit.metrics.uncertainty import exact
from coca_lit.models import CoCa
from coca_lit.projects.choice.evaluation import ChoiceAccuracy, is_right
from coca_lit.projects.choice.scenes import scene_choice_records
from coca_lit.runs.run_folder import environment
from coca_lit.weights.load import load_model
from experiments.study import Row, replace_rows

WEIGHTS = [i / 10 for i in range(11)]
COUNTS = (2, 4, 8, 16, 32, 64)


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What the function returns, and its CPU seconds."""
    start = time.process_time()
    return function(*arguments), time.process_time() - start


def reranked_rows(model: CoCa, records: Sequence[Record], counts: Sequence[int]) -> Iterator[Row]:
    """Recall for each number of candidates and each weight.

    The fewest and the most candidates are read and timed; what others take follows from their pairs.
    """
    (images, texts, image_of_text), before = timed(embed_pairs, model, records)
    similarity = model.logit_scale.exp().item() * images @ texts.T
    ends = {
        n: timed(candidate_log_likelihoods, model, records, candidate_pairs(similarity, n))
        for n in {min(counts), max(counts)}
    }
    all_read = ends[max(counts)][0]
    pairs, seconds = zip(*sorted((int(read.isfinite().sum()), spent) for read, spent in ends.values()), strict=True)
    for count in counts:
        likely = candidate_pairs(similarity, count)
        read = all_read.masked_fill(~likely, -torch.inf)
        number = int(likely.sum())
        about = {"way": "decoder", "count": str(count), "pairs": str(number)}
        about |= cost(before, float(np.interp(number, pairs, seconds)))
        for weight in WEIGHTS:
            recalls = recall_at_k(mix_scores(similarity, informative(read), weight), image_of_text)
            yield about | {"weight": str(weight)} | scores(recalls)


def view_rows(model: CoCa, records: Sequence[Record], counts: Sequence[int], most: float) -> Iterator[Row]:
    """Recall of embeddings that are the mean over the whole image and random crops of it, for each number of views
    until they have taken more than `most` CPU seconds.
    """
    (images, texts, image_of_text), before = timed(embed_pairs, model, records)
    more, views = 0.0, 1
    for count in sorted(counts):
        while views < count:
            crops = [Record(r.id, partial(crop, r, model.image_size, views), r.captions) for r in records]
            found, seconds = timed(embed_images, model, crops)
            images, more, views = images + found, more + seconds, views + 1
        recalls = recall_at_k(normalize(images, dim=1) @ texts.T, image_of_text)
        yield {"way": "views", "count": str(count)} | cost(before, more) | scores(recalls)
        if more > most:
            return


def crop(record: Record, size: int, view: int) -> Any:
    """A mild crop of the record's image, as in training on photos."""
    return to_pil_image(RandomCrop(size)(load_pixels(record.image), random.Random(f"{record.id} {view}")))


def choice_rows(model: CoCa, records: Sequence[Record]) -> Iterator[Row]:
    """Accuracy for each weight; the first caption of a record is right, its domain is the kind of the others."""
    texts = [caption for record in records for caption in record.captions]
    sizes = [len(record.captions) for record in records]
    images, features, image_of_text = embed_pairs(model, records)
    similarity = model.logit_scale.exp().item() * (images[image_of_text] * features).sum(dim=1)  # (T,)
    own = torch.arange(len(texts)).split(sizes)
    likelihood = torch.cat(inference.log_likelihoods(model, records, texts, lambda i: own[i].tolist()))  # (T,)
    ways = {"likelihood": likelihood, "pmi": likelihood - blind_log_likelihoods(model, texts)}
    for way, read in ways.items():
        for weight in WEIGHTS:
            right = is_right(((1 - weight) * similarity + weight * read).split(sizes))
            found = exact(len(records), ChoiceAccuracy(right, [record.domain for record in records]))
            yield {"way": way, "weight": str(weight)} | scores(found)


def cost(before: float, more: float) -> Row:
    """CPU seconds in addition to retrieval by embeddings alone, and by how much that multiplies its time."""
    return {"CPU seconds": f"{more:.1f}", "times": f"{1 + more / before:.2f}"}


def scores(values: dict[str, float]) -> Row:
    return {name: f"{value:.4f}" for name, value in values.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["scenes", "compositional", "flickr8k"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--root", type=Path, help="of Flickr8k")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="candidates that are read, and views")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"), help="the CSV")
    args = parser.parse_args()
    model = load_model(args.checkpoint).eval()
    split = "compositional" if args.data == "compositional" else "val"
    choices: list[Record] = []
    if args.data == "flickr8k":
        records = flickr_records(args.root, split)
    else:
        records = scene_records(split, size=model.image_size)
        choices = scene_choice_records(split, size=model.image_size)
    embed_pairs(model, records[:64])  # nothing is timed that happens once
    own, about = {"data": args.data, "model": args.checkpoint.resolve().parents[1].name}, environment()
    read = list(reranked_rows(model, records, args.counts))
    views = view_rows(model, records, args.counts, most=float(read[-1]["CPU seconds"]))
    rows = [*read, *views, *(choice_rows(model, choices) if choices else ())]
    about = {name: str(about[name]) for name in ("commit", "machine", "torch")}
    replace_rows(args.out, [own | row | about for row in rows], by=list(own))


if __name__ == "__main__":
    main()

"""Time to score captions of 5,000 images with 5 references each: aims are 15 s on 2 cores, and 30 s for METEOR.

    python experiments/benchmarks/scoring.py --captions coco_karpathy_test_generated.json
    python experiments/benchmarks/scoring.py              # invented captions, of the same number and length

The file is a list of {"captions": [references], "prediction": text}. METEOR counts from a cold start: in a run its
process loads while the model still writes captions.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from coca_lit.metrics.captions import SCORERS, caption_scores, caption_statistics, score_tokens, tokenize_captions
from coca_lit.metrics.java.meteor import shared_meteor
from experiments.benchmarks.record import record

IMAGES, REFERENCES = 5000, 5


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the caption scores.")
    parser.add_argument("--captions", type=Path, help="JSON file of captions, see above; default: invented ones")
    arguments = parser.parse_args()
    references, predictions = read(arguments.captions) if arguments.captions else invent()
    case = f"{len(references)} images, {sum(map(len, references.values()))} references"

    start = time.monotonic()
    tokens, seconds = timed(lambda: tokenize_captions(references, predictions))
    rows: list[dict[str, Any]] = [{"case": case, "score": "PTB tokens", "seconds": seconds}]
    for name in ("Bleu", "ROUGE_L", "CIDEr"):
        _, seconds = timed(partial(score_tokens, tokens, [name]))
        rows.append({"case": case, "score": name, "seconds": seconds})
    _, seconds = timed(lambda: caption_statistics(list(predictions.values())))
    rows.append({"case": case, "score": "statistics", "seconds": seconds})
    rows.append({"case": case, "score": "all but METEOR and SPICE", "seconds": time.monotonic() - start})
    for name in ("METEOR, cold", "METEOR, loaded"):
        _, seconds = timed(lambda: SCORERS["METEOR"](*tokens))
        rows.append({"case": case, "score": name, "seconds": seconds})
    _, seconds = timed(lambda: caption_scores(references, predictions))
    rows.append({"case": case, "score": "caption_scores, METEOR loaded", "seconds": seconds})
    shared_meteor().close()
    record(Path(__file__).with_suffix(".csv"), rows)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.monotonic()
    result = function()
    return result, time.monotonic() - start


def read(path: Path) -> tuple[dict[int, list[str]], dict[int, str]]:
    rows = json.loads(path.read_text())
    return {i: row["captions"] for i, row in enumerate(rows)}, {i: row["prediction"] for i, row in enumerate(rows)}


def invent() -> tuple[dict[int, list[str]], dict[int, str]]:
    """Captions of 10 words each on average from 2,000 words, the frequent ones as frequent as in a language."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeiorstlnm", k=draw.randint(2, 8))) for _ in range(2000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]

    def caption() -> str:
        return " ".join(draw.choices(words, weights, k=draw.randint(8, 12))).capitalize() + "."

    return {i: [caption() for _ in range(REFERENCES)] for i in range(IMAGES)}, {i: caption() for i in range(IMAGES)}


if __name__ == "__main__":
    main()

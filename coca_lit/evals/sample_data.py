"""Samples of what a model does, as plain values that go into a JSON file: for the report, which needs no data set
then.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.evals.samples import is_reference

EDGE = 240  # pixels of the longer side of a thumbnail
TOP = 5


def caption_samples(
    records: Sequence[Record], captions: Mapping[int | str, str], count: int = 12
) -> list[dict[str, Any]]:
    """`count` images spread over the records: {"image", "caption", "exact", "references"} and "question" where one was
    asked; see `thumbnail` for the image.
    """
    return [
        {
            **({"question": record.question} if record.question else {}),
            "image": thumbnail(record.image()),
            "caption": captions[record.id],
            "exact": is_reference(captions[record.id], record.captions),
            "references": list(dict.fromkeys(record.captions)),
        }
        for record in spread(records, count)
    ]


def retrieval_samples(
    records: Sequence[Record], images: Tensor, texts: Tensor, image_of_text: Tensor, count: int = 4
) -> dict[str, list[dict[str, Any]]]:
    """The five best answers to `count` queries in both directions, each with "hit": whether it is right.

    images (I, E), texts (T, E) and image_of_text (T,) are those of `embed_pairs`. Gives {"text_to_image": [{"text",
    "answers": [{"image", "hit"}]}], "image_to_text": [{"image", "answers": [{"text", "hit"}]}]}.
    """
    captions = [caption for record in records for caption in record.captions]
    samples: dict[str, list[dict[str, Any]]] = {"text_to_image": [], "image_to_text": []}
    for i in spread(range(len(records)), count):
        text = int((image_of_text == i).nonzero()[0])
        best_images = _top(images @ texts[text])
        answers = [{"image": thumbnail(records[j].image()), "hit": j == i} for j in best_images]
        samples["text_to_image"].append({"text": captions[text], "answers": answers})
        best_texts = _top(texts @ images[i])
        found = [{"text": captions[t], "hit": int(image_of_text[t]) == i} for t in best_texts]
        samples["image_to_text"].append({"image": thumbnail(records[i].image()), "answers": found})
    return samples


def thumbnail(image: Image.Image) -> str:
    """A data URI: small images as they are (PNG), larger ones reduced (JPEG)."""
    buffer = io.BytesIO()
    small = max(image.size) <= EDGE
    if not small:
        image = image.copy()
        image.thumbnail((EDGE, EDGE))
    image.save(buffer, "PNG" if small else "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def spread(items: Sequence[Any], count: int) -> Sequence[Any]:
    return items[:: max(len(items) // count, 1)][:count]


def _top(similarity: Tensor) -> list[int]:
    return torch.topk(similarity, min(TOP, len(similarity))).indices.tolist()

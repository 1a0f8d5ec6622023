"""Loads released models with coca_lit and with OpenCLIP, compares both on the photos of the package, keeps a record.

python experiments/released/compare.py coca_ViT-B-32/laion2b_s13b_b90k

Writes `records/NAME.json`: versions, machine, the file and its SHA-256, differences, scores, captions. Exit code 1 if a
model differs by more than `ALLOWED`.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip import coca_model
from PIL import Image
from torch import Tensor

from coca_lit.data.transforms import build_transform
from coca_lit.metrics.retrieval import recall_at_k
from coca_lit.models.image import CLIP_NORMALISATION
from coca_lit.weights.hub import PHOTOS_WEIGHTS, Released, locate, released
from coca_lit.weights.load import load_model
from experiments.benchmarks.record import provenance
from experiments.photos.picture import TEXTS

RECORDS = Path(__file__).with_name("records")
ALLOWED = 1e-3  # difference, as a share of the largest value that OpenCLIP computes
LENGTH = 30  # tokens of a caption


class Computed(NamedTuple):
    """What one of the libraries makes of P photos and a text about each."""

    pixels: Tensor  # (P, 3, H, W), normalised
    tokens: Tensor  # (P, L), padded with 0
    image_features: Tensor  # (P, E)
    text_features: Tensor  # (P, E)
    logits: Tensor  # (N, V), for each token of the texts after the first
    labels: Tensor  # (N,), these tokens
    greedy: list[str]  # captions
    beams: list[str] | None  # captions by OpenCLIP's beam search, where it runs

    def scores(self) -> dict[str, float]:
        similarity = self.text_features @ self.image_features.T
        recalls = recall_at_k(similarity, range(len(similarity)), ks=(1,))
        return recalls | {"caption_loss": F.cross_entropy(self.logits, self.labels).item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="released captioners, as `coca_lit.list_models` names them")
    parser.add_argument("--output", type=Path, default=RECORDS, help="folder of the records")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    unequal = []
    for name in options.names:
        model = released(name)
        if model is None or not model.captions:
            parser.error(f"'{name}' is no released captioner")
        record = compare(model)
        file = options.output / f"{model.name.replace('/', '_')}.json"
        file.write_text(json.dumps(record, indent=2) + "\n")
        print(f"{model.name}: {record['differences']}, written to {file}")
        if not record["equal"]:
            unequal.append(model.name)
    if unequal:
        sys.exit(f"more than {ALLOWED:.0e} apart, or other tokens: {', '.join(unequal)}")


@torch.inference_mode()
def compare(model: Released) -> dict[str, Any]:
    """The record of a released model."""
    names = list(TEXTS)
    photos = [Image.open(PHOTOS_WEIGHTS.with_name(f"{name}.jpg")).convert("RGB") for name in names]
    theirs = by_open_clip(model, photos)
    ours, same_pixels = by_coca_lit(model, photos, theirs.pixels)
    differences = {
        "image features, of the same pixels": difference(same_pixels, theirs.image_features),
        "image features": difference(ours.image_features, theirs.image_features),
        "text features": difference(ours.text_features, theirs.text_features),
        "caption logits": difference(ours.logits, theirs.logits),
        "pixels": difference(ours.pixels, theirs.pixels),
    }
    same_tokens = torch.equal(ours.tokens, theirs.tokens)
    network = [differences[name] for name in ("image features, of the same pixels", "text features", "caption logits")]
    file = locate(model.name)
    return {
        "model": model.name,
        "repository": model.repo,
        "file": file.name,
        "sha256": hashlib.file_digest(file.open("rb"), "sha256").hexdigest(),
        **provenance(),
        "equal": same_tokens and all(value <= ALLOWED for value in network),
        "same tokens": same_tokens,
        "differences": differences,
        "scores": {"coca_lit": ours.scores(), "OpenCLIP": theirs.scores()},
        "same greedy captions": sum(map(str.__eq__, ours.greedy, theirs.greedy)),
        "same captions by beam search": theirs.beams and ours.beams and sum(map(str.__eq__, ours.beams, theirs.beams)),
        "captions": {name: {"coca_lit": ours.greedy[i], "OpenCLIP": theirs.greedy[i]} for i, name in enumerate(names)},
    }


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, as a share of the largest value of OpenCLIP."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def by_open_clip(model: Released, photos: Sequence[Image.Image]) -> Computed:
    """By its own download, transform, tokenizer and network; greedy captions by whole forward passes."""
    architecture, _, tag = model.name.partition("/")
    known = (architecture, tag) in open_clip.list_pretrained()
    name = architecture if known else f"hf-hub:{model.repo}"
    net, _, transform = open_clip.create_model_and_transforms(name, pretrained=tag if known else None)
    net = net.eval()
    pixels = torch.stack([transform(photo) for photo in photos])
    tokens = open_clip.get_tokenizer(name)(list(TEXTS.values()))
    out = net(pixels, tokens)
    real = out["labels"] != 0

    def next_logits(ids: Tensor) -> Tensor:
        return net(pixels, ids, output_labels=False)["logits"][:, -1]

    beams = None
    if coca_model._has_transformers:  # which needs transformers 4.56.2
        beams = [as_text(ids) for ids in net.generate(pixels)]
    features, logits = (out["image_features"], out["text_features"]), out["logits"][real]
    return Computed(pixels, tokens, *features, logits, out["labels"][real], greedy(next_logits, len(photos)), beams)


def greedy(next_logits: Callable[[Tensor], Tensor], count: int) -> list[str]:
    """The likeliest token after token, without a cache; the last of `LENGTH` would be the end."""
    ids = torch.full((count, 1), open_clip.tokenizer._tokenizer.sot_token_id)
    for _ in range(LENGTH - 2):
        ids = torch.cat([ids, next_logits(ids).argmax(dim=1, keepdim=True)], dim=1)
    return [as_text(row) for row in ids]


def as_text(ids: Tensor) -> str:
    """What stands between the start and the first end."""
    text: str = open_clip.decode(ids)
    return text.partition("<end_of_text>")[0].replace("<start_of_text>", "").strip()


def by_coca_lit(model: Released, photos: Sequence[Image.Image], pixels: Tensor) -> tuple[Computed, Tensor]:
    """By its own download, transform, tokenizer and network; and its image features of OpenCLIP's pixels."""
    net = load_model(model.name)
    transform = build_transform(**net.preprocessing)
    images = torch.stack([torch.as_tensor(transform(photo)) for photo in photos])  # (P, 3, H, W), uint8
    mean, std = (torch.tensor(CLIP_NORMALISATION[key]).view(3, 1, 1) for key in ("mean", "std"))
    tokens = net.tokenizer(list(TEXTS.values()))
    out = net(images, tokens)
    of_pixels = net(pixels, tokens)  # so that the logits depend on the network alone
    assert out.image_features is not None
    assert of_pixels.image_features is not None
    assert of_pixels.text_features is not None
    assert of_pixels.labels is not None
    captions = [as_text(ids) for ids in net.generate(pixels, max_length=LENGTH)]
    beams = [as_text(ids) for ids in net.generate(pixels, strategy="beam", scoring="openclip_legacy")]
    computed = Computed(
        (images / 255 - mean) / std,
        tokens,
        out.image_features,
        of_pixels.text_features,
        of_pixels.logits,
        of_pixels.labels,
        captions,
        beams,
    )
    return computed, of_pixels.image_features


if __name__ == "__main__":
    main()

"""Retrieval with a second look: what the vectors find likely, the decoder reads.

A dual encoder compares two vectors. The decoder of the same model reads a text word by word beside all tokens of an
image, log p(text | image), which sees more and costs a pass for every pair. So only the pairs among each other's
nearest are read, as matching heads re-rank them in ALBEF (Li et al. 2021, arXiv 2107.07651), but without such a head.

A text that is likely beside any image says little about this one. So its likelihood is divided by its mean over the
images that it was read with.

Shapes: I images, T texts, E embedding width.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from coca_lit.data.records import Record
from coca_lit.distributed import gather_objects
from coca_lit.evals.inference import evaluating, image_batches
from coca_lit.models import CoCa

NEVER = 1e4  # further than any two scores are apart


def decoder_rerank(
    model: CoCa,
    records: Sequence[Record],
    image_features: Tensor,
    text_features: Tensor,
    candidates: int,
    weight: float,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Tensor:
    """Similarities (I, T) of images and all their captions, on the CPU of every rank.

    A pair that was read has (1 - weight) · exp(logit_scale) · cosine + weight · log (p(text | image) / p(text)); all
    others follow behind those, in the order of their cosines.

    Args:
        image_features, text_features: (I, E) and (T, E) of `embed_pairs`.
        candidates: images that are read with each text; each image is read with as many texts as make as many pairs.
        weight: of the likelihood, between 0 and 1.

    Raises:
        ValueError: no candidates, a weight that is no share, or a model without decoder.
    """
    if model.decoder is None:
        raise ValueError("only a model with a decoder can read texts beside images (decoder_layers=0)")
    check_second_look(candidates, weight)
    similarity = model.logit_scale.exp().item() * image_features @ text_features.T  # (I, T)
    read = log_likelihoods(model, records, likely_pairs(similarity, candidates), batch_size, num_workers)
    return mixed(similarity, read, weight)


def check_second_look(candidates: int, weight: float) -> None:
    """Raises ValueError for no candidates, or a weight that is no share."""
    if candidates < 1 or not 0 <= weight <= 1:
        raise ValueError(f"expected 1 or more candidates and a weight from 0 to 1, got {candidates} and {weight}")


def mixed(similarity: Tensor, read: Tensor, weight: float) -> Tensor:
    """Scores of `decoder_rerank`, from similarities (I, T) and log-likelihoods (I, T) of the pairs that were read;
    -inf marks the others.
    """
    likely = ~read.isneginf()
    informative = read - (read.logsumexp(dim=0) - likely.sum(dim=0).log())
    similarity = (1 - weight) * similarity
    return torch.where(likely, similarity + weight * informative, similarity - NEVER)


def likely_pairs(similarity: Tensor, candidates: int) -> Tensor:
    """Whether (I, T) the image is among the nearest of the text, or the text among those of the image."""
    images, texts = similarity.shape
    likely = torch.zeros_like(similarity, dtype=torch.bool)
    likely.scatter_(0, similarity.topk(min(candidates, images), dim=0).indices, True)
    each = math.ceil(min(candidates, images) * texts / images)
    return likely.scatter_(1, similarity.topk(each, dim=1).indices, True)


def log_likelihoods(
    model: CoCa, records: Sequence[Record], likely: Tensor, batch_size: int = 64, num_workers: int = 0
) -> Tensor:
    """log p(text | image) (I, T) where `likely`, -inf elsewhere."""
    tokens = model.tokenizer([caption for record in records for caption in record.captions])  # (T, L)
    own: list[tuple[int, Tensor]] = []
    for positions, images in image_batches(model, records, batch_size, num_workers):
        encoded = evaluating(model, model.image_encoder, images)  # (B, S, C)
        for position, image in zip(positions, encoded, strict=True):
            texts = tokens[likely[position]].to(model.device)
            beside = partial(model.log_likelihood, image[None])
            parts = [evaluating(model, beside, part).cpu() for part in texts.split(batch_size)]
            own.append((position, torch.cat(parts)))
    found = torch.full(likely.shape, -torch.inf)
    for part in gather_objects(own):
        for position, values in part:
            found[position, likely[position]] = values
    return found

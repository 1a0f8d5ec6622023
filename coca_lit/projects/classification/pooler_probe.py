"""A probe with an attentional pooler: what all tokens of a frozen image encoder know about classes.

Shapes: N training images, I images to classify, S tokens, C width of the encoder, K classes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from coca_lit.data.feature_cache import BYTES, FeatureCache, read_features
from coca_lit.data.prefetch import worker_options
from coca_lit.data.records import Record
from coca_lit.data.sources import Transform
from coca_lit.data.transforms import build_transform, loaded, whole
from coca_lit.distributed import forked_rng, gather_objects
from coca_lit.errors import check_number
from coca_lit.models import CoCa
from coca_lit.models.image import ImageEncoder
from coca_lit.models.inputs import Input, joined, stack_images
from coca_lit.models.poolers import AttentionalPooler


class Probed(NamedTuple):
    """Logits (I, K) of the pooler, and of both sets the means over tokens, (N, C) and (I, C): the same features for a
    linear classifier.
    """

    logits: Tensor
    train_means: Tensor
    means: Tensor


@dataclass(frozen=True)
class PoolerProbe:
    """A learned query that attends to all tokens of the frozen encoder, and a linear layer on what it gathers, trained
    with AdamW and half a cosine (CoCa, arXiv 2205.01917, section 4.1: "frozen").

    Tokens are stored in fp16, once for all evaluations of an encoder. Images beyond `max_gb` are encoded anew in every
    epoch.

    Args:
        cache_dir: folder of the stored tokens, see `coca_lit.data.feature_cache`.
        epochs: passes over the training images; 0 for no such probe.
        lr, weight_decay: as for `torch.optim.AdamW`.
        batch_size: images of a step.
        heads: of the pooler.
        label_smoothing: the share of every target that is spread over the classes.
        max_gb: of stored tokens, training and other images together.
        seed: of initial values and order.
    """

    cache_dir: str
    epochs: int = 20
    lr: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 256
    heads: int = 8
    label_smoothing: float = 0.0
    max_gb: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("epochs", 0), ("batch_size", 1), ("heads", 1)):
            check_number(name, getattr(self, name), whole=True, at_least=lowest)
        for name in ("lr", "weight_decay", "max_gb"):
            check_number(name, getattr(self, name), at_least=0)
        check_number("label_smoothing", self.label_smoothing, at_least=0, at_most=1)

    @property
    def conditions(self) -> dict[str, Any]:
        """What its scores depend on."""
        names = ("epochs", "lr", "weight_decay", "batch_size", "heads", "label_smoothing", "seed")
        return {name: getattr(self, name) for name in names}

    def probe(
        self,
        model: CoCa,
        training: Sequence[Record],
        labels: Tensor,
        images: Sequence[Record],
        classes: int,
        workers: int = 0,
    ) -> Probed:
        """Learns the training images with their labels (N,), and classifies the others; the same on every rank."""
        with _frozen(model.image_encoder) as encoder, forked_rng(model.device):
            transform = build_transform(**model.preprocessing)
            pixels = loaded(training[0].image, transform)
            with torch.no_grad():
                values = joined(encoder(pixels[None].to(model.device))).numel()
            fitting = int(self.max_gb * 1e9 // (BYTES * values))  # token maps
            stored = min(len(training), fitting)  # the training images first, which are read in every epoch
            arguments = model.config.image_encoder_args or {}
            maps = [
                TokenMaps(encoder, transform, records, self.cache_dir, count, model.device, workers, arguments)
                for records, count in ((training, stored), (images, min(len(images), fitting - stored)))
            ]
            torch.manual_seed(self.seed)  # now: to store tokens takes random numbers too
            with torch.enable_grad():
                head = self.train(maps[0], labels.to(model.device), encoder.width, classes)
            means = [torch.cat([tokens.mean(dim=1).cpu() for _, tokens in of.batches(self.batch_size)]) for of in maps]
            with torch.no_grad():
                logits = torch.cat([head(tokens).cpu() for _, tokens in maps[1].batches(self.batch_size)])
        return Probed(gather_objects(logits)[0], *means)

    def train(self, maps: "TokenMaps", labels: Tensor, width: int, classes: int) -> "ClassPooler":
        """A head that has learned the labels (N,) of the token maps."""
        head = ClassPooler(width, classes, self.heads).to(labels.device)
        steps = self.epochs * math.ceil(len(labels) / self.batch_size)
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(self.epochs):
            for positions, tokens in maps.batches(self.batch_size, torch.randperm(len(labels)).tolist()):
                optimizer.zero_grad()
                F.cross_entropy(head(tokens), labels[positions], label_smoothing=self.label_smoothing).backward()
                optimizer.step()
                schedule.step()
        return head.eval()


class ClassPooler(nn.Module):
    """Tokens (B, S, C) -> logits (B, K): an attentional pooler with one query, and a linear layer."""

    def __init__(self, width: int, classes: int, heads: int) -> None:
        super().__init__()
        self.pooler = AttentionalPooler(width, width, 1, heads)
        self.pooler.init_parameters()
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.pooler(tokens)[:, 0])


class TokenMaps:
    """The tokens of images by a frozen encoder: those of the first `stored` from a file, the others computed when they
    are asked for.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        transform: Transform,
        records: Sequence[Record],
        cache_dir: str | Path,
        stored: int,
        device: torch.device,
        workers: int,
        arguments: Mapping[str, Any],
    ) -> None:
        self.encoder, self.transform, self.records = encoder, transform, records
        self.stored, self.device, self.workers = stored, device, workers
        self.path: Path | None = None
        if stored:
            cache = FeatureCache(cache_dir, encoder, transform, whole, seed=0, arguments=arguments)
            (self.path,) = cache.encode(records[:stored], 1, workers, device, trained=False)

    @torch.no_grad()
    def batches(self, size: int, order: Sequence[int] | None = None) -> Iterator[tuple[list[int], Tensor]]:
        """(positions, tokens (B, S, C) fp32) of all images, in their order or in another one."""
        order = range(len(self.records)) if order is None else order
        parts = [list(order[start : start + size]) for start in range(0, len(order), size)]
        load = partial(_items, self.records, self.path, self.stored, self.transform)  # without the encoder
        every = cast(Dataset[int], range(len(self.records)))
        loader = DataLoader(every, batch_sampler=parts, collate_fn=load, **worker_options(self.workers))
        for positions, batch in zip(parts, loader, strict=True):
            pixels = [i for i, item in enumerate(batch) if isinstance(item, Input) or item.ndim > 2]
            if pixels:
                images = stack_images([batch[i] for i in pixels]).to(self.device)
                for i, tokens in zip(pixels, joined(self.encoder(images)).half(), strict=True):
                    batch[i] = tokens
            yield positions, torch.stack([item.to(self.device) for item in batch]).float()


def _items(
    records: Sequence[Record], path: Path | None, stored: int, transform: Transform, positions: Sequence[int]
) -> list[Any]:
    """Tokens (S, C) of the stored images, pixels (3, H, W) or an `Input` of the others; in a worker."""
    return [
        read_features(path, i) if path is not None and i < stored else loaded(records[i].image, transform)
        for i in positions
    ]


@contextmanager
def _frozen(encoder: ImageEncoder) -> Iterator[ImageEncoder]:
    """In evaluation mode and without gradients within the block, afterwards as before."""
    training, trained = encoder.training, [p for p in encoder.parameters() if p.requires_grad]
    encoder.eval()
    try:
        for p in trained:
            p.requires_grad_(False)
        yield encoder
    finally:
        for p in trained:
            p.requires_grad_(True)
        encoder.train(training)

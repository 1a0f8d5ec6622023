"""Classifiers that are trained beside the network, and one of images, with an attentional pooler of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.data.feature_cache import swap_sides
from coca_lit.data.records import Record
from coca_lit.errors import ConfigError, DataError, check_number
from coca_lit.evals.inference import rows_of
from coca_lit.models import CoCa
from coca_lit.models.inputs import Images, Input, joined
from coca_lit.models.packing import to_device
from coca_lit.models.poolers import AttentionalPooler
from coca_lit.training.objectives import Objective


class Classifier(Objective):
    """A linear layer over features of a sample, one logit for each class, with cross-entropy. A subclass says what the
    features are: `width_of` and `features`.

    Args:
        classes: the labels, each the first caption of a record.
        label_smoothing: the share of every target that is spread over the classes, in training.
        weight: factor of the loss, by the name of the term.
    """

    reads_captions = False
    is_counted = True

    def __init__(self, classes: Sequence[str], label_smoothing: float = 0.0, **weight: float) -> None:
        super().__init__(**weight)
        for name in classes:
            if not isinstance(name, str):
                raise ValueError(f"expected classes as texts, got {name!r:.80}: write it in quotes")
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise ValueError(f"expected two or more different classes to choose from, got {len(classes)}")
        check_number("label_smoothing", label_smoothing, at_least=0, at_most=1)
        (self.term,) = weight
        self.classes = list(classes)
        self.label_smoothing = label_smoothing
        self.class_numbers = {name: number for number, name in enumerate(classes)}
        # Labels of mirror images: "left" is "Right" beside "Wrong", and "Left" beside "Right".
        self._mirrored_numbers: dict[str, int] = {}
        for name, number in self.class_numbers.items():
            self._mirrored_numbers[swap_sides(name)] = number
        for name, number in list(self._mirrored_numbers.items()):
            self._mirrored_numbers[swap_sides(name)] = number

    def build(self, net: CoCa) -> None:
        self.head = nn.Linear(self.width_of(net), len(self.classes))
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    @property
    def config(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def check_resumed(self, before: Mapping[str, Any]) -> None:
        """Raises ValueError if its rows stood for other classes."""
        if before.get("classes") != self.classes:
            raise ValueError("the data have other classes than the checkpoint: restore them, or choose another name")

    def example(self, batch: Batch) -> Batch:
        labels = [(self.classes[0],)] * len(batch.tokens)
        return batch._replace(extras={"captions": labels})

    def width_of(self, net: CoCa) -> int:
        """The length D of the features of a sample."""
        raise NotImplementedError

    def features(self, net: CoCa, batch: Batch) -> Tensor | None:
        """(B, D); None for a batch that is not for this classifier."""
        raise NotImplementedError

    def features_of(self, net: CoCa, records: Sequence[Record], images: Images) -> Tensor:
        """(B, D) of records whose images are at hand."""
        raise NotImplementedError

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy in nats per sample; 0 for a batch that is not for this classifier."""
        features = self.features(net, batch)
        if features is None:
            return {self.term: 0 * (self.head.weight.sum() + self.head.bias.sum())}
        logits = self.head(features).float()
        return {self.term: self.loss_of(logits, batch)}

    def loss_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """Of logits (B, N): a scalar."""
        numbers = torch.tensor([self.number(captions[0]) for captions in batch.extras["captions"]])
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits, to_device(numbers, logits.device), label_smoothing=smoothing)

    def number(self, label: str) -> int:
        """Of a class, also by its label of a mirror image; raises `DataError` if there is no such class."""
        number = self.class_numbers.get(label, self._mirrored_numbers.get(label))
        if number is None:
            known = ", ".join(self.classes[:5]) + (", …" if len(self.classes) > 5 else "")
            raise DataError(f"the data have the label {label!r:.80}, and the classifier {known}: name all classes")
        return number

    def logits(self, net: CoCa, records: Sequence[Record], batch_size: int = 64, num_workers: int = 0) -> Tensor:
        """(I, N) of records and classes, on the CPU of every rank."""

        def compute(part: Sequence[Record], images: Images) -> Tensor:
            features = self.features_of(net, part, images)
            return self.head(features.to(self.head.weight.dtype))  # the network may be in bf16

        return rows_of(net, records, compute, batch_size, num_workers)


class PoolerClassifier(Classifier):
    """Classifies images by an attentional pooler of its own on the tokens of the image encoder (CoCa, arXiv 2205.01917,
    section 4.1: "finetuned").

    Args:
        heads: of the pooler.
        mixup: a and b of the beta distribution of the share of each image in a mixture of two (Zhang et al. 2018, arXiv
            1710.09412), whose target is mixed alike; 0 mixes nothing.
    """

    def __init__(
        self,
        classes: Sequence[str],
        heads: int = 8,
        mixup: float = 0.0,
        label_smoothing: float = 0.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(classes, label_smoothing, labels=weight)
        check_number("heads", heads, whole=True, at_least=1)
        check_number("mixup", mixup, at_least=0)
        self.heads = heads
        self.mixup = mixup

    def build(self, net: CoCa) -> None:
        if net.image_encoder.token_kind is not None:
            encoder = type(net.image_encoder).__name__
            raise ValueError(f"the classifier takes images of one shape: use another image encoder than {encoder}")
        width = net.image_encoder.width
        self.pooler = AttentionalPooler(width, width, 1, self.heads)
        self.pooler.init_parameters()
        super().build(net)

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"heads": self.heads}

    def width_of(self, net: CoCa) -> int:
        return net.image_encoder.width

    def features(self, net: CoCa, batch: Batch) -> Tensor:
        return self.features_of(net, (), batch.images)

    def features_of(self, net: CoCa, records: Sequence[Record], images: Images) -> Tensor:
        tokens = joined(net.image_encoder(images), net.pooling)
        return self.pooler(tokens.to(self.head.weight.dtype))[:, 0]

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy in nats per image; in training of mixtures of the first image with the last, and so on.

        Raises:
            ConfigError: stored features are to be mixed.
        """
        if not self.training or not self.mixup:
            return super().forward(net, batch)
        share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
        logits = self.head(self.features(net, self.mixed(net, batch, share))).float()
        reversed_labels = batch._replace(extras={"captions": batch.extras["captions"][::-1]})
        loss = share * self.loss_of(logits, batch) + (1 - share) * self.loss_of(logits, reversed_labels)
        return {self.term: loss}

    @staticmethod
    def mixed(net: CoCa, batch: Batch, share: float) -> Batch:
        """Each image with this share, and with the rest the image that has its place from the end."""
        pixels = batch.images.rows if isinstance(batch.images, Input) else batch.images
        if pixels.ndim < 4:
            raise ConfigError("mixup mixes pixels, and data.cached_augmentations keeps features: set one of them to 0")
        if not pixels.is_floating_point():
            pixels = net.image_encoder.normalise(pixels.flatten(0, -4)).view(pixels.shape)  # frames as images
        pixels = share * pixels + (1 - share) * pixels.flip(0)
        images: Images = replace(batch.images, rows=pixels) if isinstance(batch.images, Input) else pixels
        return batch._replace(images=images)

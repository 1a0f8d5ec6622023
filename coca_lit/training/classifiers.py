"""Classifiers that are trained beside the network: of a text beside one or several images, by the decoder's state; and
of images, by an attentional pooler of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.data.batch import Batch, padded
from coca_lit.data.feature_cache import swap_sides
from coca_lit.data.records import Record
from coca_lit.errors import ConfigError, DataError, check_number
from coca_lit.evals.inference import rows_of
from coca_lit.losses import caption_loss
from coca_lit.metrics.vqa import enough_people, normalize_answer, vqa_accuracy
from coca_lit.models import CoCa
from coca_lit.models.coca import CAPTION, IGNORED_LABEL
from coca_lit.models.inputs import Images, Input, joined
from coca_lit.models.packing import Layout, to_device
from coca_lit.models.poolers import AttentionalPooler
from coca_lit.models.registry import register_objective
from coca_lit.models.text import expect_decoder
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
        if wrong := [name for name in classes if not isinstance(name, str)]:
            raise ValueError(f"expected classes as texts, got {wrong[0]!r:.80}: write it in quotes")
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise ValueError(f"expected two or more different classes to choose from, got {len(classes)}")
        check_number("label_smoothing", label_smoothing, at_least=0, at_most=1)
        (self.term,) = weight
        self.classes, self.label_smoothing = list(classes), label_smoothing
        self._numbers = {name: i for i, name in enumerate(classes)}
        # Labels of mirror images: "left" is "Right" beside "Wrong", and "Left" beside "Right".
        swapped = {swap_sides(name): i for name, i in self._numbers.items()}
        self._mirrored = swapped | {swap_sides(name): i for name, i in swapped.items()}

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
        return batch._replace(prefix_lengths=batch.lengths, extras={"captions": labels})

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
        if (features := self.features(net, batch)) is None:
            return {self.term: 0 * (self.head.weight.sum() + self.head.bias.sum())}
        return {self.term: self.loss_of(self.head(features).float(), batch)}

    def loss_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """Of logits (B, N): a scalar."""
        targets = to_device(
            torch.tensor([self.number(people[0]) for people in batch.extras["captions"]]), logits.device
        )
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing if self.training else 0.0)

    def number(self, label: str) -> int:
        """Of a class, also by its label of a mirror image; raises `DataError` if there is no such class."""
        if (number := self._numbers.get(label, self._mirrored.get(label))) is None:
            known = ", ".join(self.classes[:5]) + (", …" if len(self.classes) > 5 else "")
            raise DataError(f"the data have the label {label!r:.80}, and the classifier {known}: name all classes")
        return number

    def logits(self, net: CoCa, records: Sequence[Record], batch_size: int = 64, num_workers: int = 0) -> Tensor:
        """(I, N) of records and classes, on the CPU of every rank."""

        def compute(part: Sequence[Record], images: Images) -> Tensor:
            features = self.features_of(net, part, images)
            return self.head(features.to(self.head.weight.dtype))  # the network may be in bf16

        return rows_of(net, records, compute, batch_size, num_workers)


@register_objective("StateClassifier")
class StateClassifier(Classifier):
    """Classifies the decoder's state at the end of a text, which depends on the text and the image; of several images
    the states side by side, as CoCa does for NLVR2 (arXiv 2205.01917, appendix).

    Args:
        images: of each record.
        true_label: the class of texts that are true of their images. They have the caption loss too, in the same pass:
            what its gradient says about every word, a label says about the whole text. None for labels alone.
        true_weight: factor of that loss, above 0.
    """

    true_label: str | None = None

    def __init__(
        self,
        classes: Sequence[str],
        images: int = 1,
        label_smoothing: float = 0.0,
        weight: float = 1.0,
        true_label: str | None = None,
        true_weight: float = 1.0,
    ) -> None:
        super().__init__(classes, label_smoothing, labels=weight)
        check_number("images", images, whole=True, at_least=1)
        if true_label is not None:
            if true_label not in self.classes:
                raise ValueError(
                    f"true_label must be one of the classes, such as {self.classes[0]!r:.80}, got {true_label!r:.80}"
                )
            check_number("true_weight", true_weight, above=0)
            self.weights = self.weights | {"true_texts": true_weight}
            self.averages_tokens = True
        self.images, self.true_label = images, true_label

    def build(self, net: CoCa) -> None:
        if net.decoder is None:
            raise ValueError("texts are classified by a decoder, which a model with decoder_layers=0 lacks")
        self.trains = net.parts_for(("hidden",) if self.true_label is None else CAPTION)
        super().build(net)

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"images": self.images}

    def width_of(self, net: CoCa) -> int:
        return self.images * net.config.text_width

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        if self.true_label is None or batch.prefix_lengths is None:
            return super().forward(net, batch)
        states, layout = self.states(net, batch.images, batch.tokens, batch.prefix_lengths)
        ends = self.beside(batch.prefix_lengths) - 1  # (B · n,)
        logits = self.head(self.joined(layout.gather_at(states, ends))).float()
        true_number = self.number(self.true_label)
        are_true = torch.tensor([self.number(people[0]) == true_number for people in batch.extras["captions"]])  # (B,)
        true = self.beside(are_true)  # (B · n,)
        predicts = true[:, None] & (layout.positions < ends[:, None])  # (B · n, L)
        following = self.beside(batch.tokens).roll(-1, dims=1)[:, : layout.max_length]
        labels = layout.compact(layout.pack(following), predicts)
        if net.tokenizer.unk_id is not None:
            labels = labels.masked_fill(labels == net.tokenizer.unk_id, IGNORED_LABEL)
        vocabulary = expect_decoder(net.decoder).vocabulary.weight
        true_texts = caption_loss(layout.compact(states, predicts), vocabulary, labels)
        return {self.term: self.loss_of(logits, batch), "true_texts": true_texts}

    def features(self, net: CoCa, batch: Batch) -> Tensor | None:
        if batch.prefix_lengths is None:
            return None
        return self.at_ends(net, batch.images, batch.tokens, batch.prefix_lengths)

    def features_of(self, net: CoCa, records: Sequence[Record], images: Images) -> Tensor:
        label = self.classes[0]  # the texts are cut as in training, where the label follows
        answered = (net.tokenizer.encode_answer(record.question, label) for record in records)
        rows = [ids[:length] for ids, length in answered]
        tokens, lengths = padded(rows, net.tokenizer.pad_id)
        return self.at_ends(net, images, tokens.to(net.device), lengths)

    def at_ends(self, net: CoCa, images: Images, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, n · D) for n images of each of B texts; raises `DataError` for another number of images."""
        states, layout = self.states(net, images, tokens, lengths)
        return self.joined(layout.gather_at(states, self.beside(lengths) - 1))

    def states(self, net: CoCa, images: Images, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Layout]:
        """The decoder's states of B · n texts, each beside one of its images, and their layout."""
        if len(images) != self.images * len(tokens):
            raise DataError(
                f"the classifier takes {self.images} images with each text, got {len(images)} images and {len(tokens)} "
                "texts: set model.objectives.NAME.images"
            )
        return net.multimodal_states(images, self.beside(tokens), self.beside(lengths).cpu())

    def beside(self, x: Tensor) -> Tensor:
        """(B, …) -> (B · n, …), once for each image."""
        return x.repeat_interleave(self.images, dim=0)

    def joined(self, states: Tensor) -> Tensor:
        """(B · n, D) -> (B, n · D)"""
        return states.unflatten(0, (-1, self.images)).flatten(1)


@register_objective("AnswerClassifier")
class AnswerClassifier(StateClassifier):
    """Answers as classes. Every answer is a binary classification whose target is the accuracy that the answer would
    score (Teney et al. 2017, arXiv 1708.02711): people disagree, and several answers can be right.

    Args:
        answers: the classes, normalised.
        weight: factor of the loss, a sum over answers.
    """

    def __init__(self, answers: Sequence[str], weight: float = 1.0) -> None:
        Classifier.__init__(self, answers, answers=weight)
        self.images = 1

    @classmethod
    def rebuilt(cls, config: Mapping[str, Any]) -> "AnswerClassifier":
        return cls(config["classes"])

    def build(self, net: CoCa) -> None:
        super().build(net)
        nn.init.constant_(self.head.bias, -5.0)  # at first every answer counts as wrong, as most are

    def loss_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """Summed over answers."""
        targets = to_device(self.targets(batch.extras["captions"]), logits.device)
        return F.binary_cross_entropy_with_logits(logits, targets) * len(self.classes)

    def targets(self, answers: Sequence[Sequence[str]]) -> Tensor:
        """(B, N): the score of each of the N answers against the people's answers to each of B questions."""
        targets = torch.zeros(len(answers), len(self.classes))
        for row, people in zip(targets, map(enough_people, answers), strict=True):
            for answer in set(people):
                if (i := self._numbers.get(normalize_answer(answer))) is not None:
                    row[i] = max(row[i].item(), vqa_accuracy(answer, people))
        return targets


@register_objective("PoolerClassifier")
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
        self.heads, self.mixup = heads, mixup

    def build(self, net: CoCa) -> None:
        if net.image_encoder.takes_patches:
            raise ValueError("the classifier takes images of one shape: use another image encoder than naflex")
        self.pooler = AttentionalPooler(net.image_encoder.width, net.image_encoder.width, 1, self.heads)
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
        encoded = net.image_encoder(images)
        return self.pooler(joined(encoded, net.pooling).to(self.head.weight.dtype))[:, 0]

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy in nats per image; in training of mixtures of the first image with the last, and so on.

        Raises:
            ConfigError: clips are to be pooled frame by frame, or stored features to be mixed.
        """
        if not self.training or not self.mixup:
            return super().forward(net, batch)
        share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
        pixels = batch.images.rows if isinstance(batch.images, Input) else batch.images
        if pixels.ndim < 4:
            raise ConfigError("mixup mixes pixels, and data.cached_augmentations keeps features: set one of them to 0")
        if not pixels.is_floating_point():
            pixels = net.image_encoder.normalise(pixels.flatten(0, -4)).view(pixels.shape)  # frames as images
        pixels = share * pixels + (1 - share) * pixels.flip(0)
        images = replace(batch.images, rows=pixels) if isinstance(batch.images, Input) else pixels
        mixed = batch._replace(images=images)
        logits = self.head(self.features(net, mixed)).float()
        other = batch._replace(extras={"captions": batch.extras["captions"][::-1]})
        return {self.term: share * self.loss_of(logits, batch) + (1 - share) * self.loss_of(logits, other)}

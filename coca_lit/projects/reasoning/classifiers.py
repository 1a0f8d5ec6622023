"""Classifiers of a text beside one or several images, by the decoder's state at the end of the text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_lit.data.batch import Batch, padded
from coca_lit.data.records import Record
from coca_lit.errors import DataError, check_number
from coca_lit.losses import caption_loss
from coca_lit.models import CoCa
from coca_lit.models.coca import CAPTION, IGNORED_LABEL
from coca_lit.models.inputs import Images
from coca_lit.models.packing import Layout, to_device
from coca_lit.models.text import expect_decoder
from coca_lit.projects.classification.classifier import Classifier
from coca_lit.projects.reasoning.accuracy import enough_people, normalize_answer, vqa_accuracy


class StateClassifier(Classifier):
    """Classifies the decoder's state at the end of a text, which depends on the text and the image; of several images
    the states side by side, as CoCa does for NLVR2 (arXiv 2205.01917, appendix).

    Args:
        images: n of each record.
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
        self.images = images
        self.true_label = true_label

    def build(self, net: CoCa) -> None:
        if net.decoder is None:
            raise ValueError("texts are classified by a decoder, which a model with decoder_layers=0 lacks")
        self.trains = net.parts_for(("hidden",) if self.true_label is None else CAPTION)
        super().build(net)

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"images": self.images}

    def example(self, batch: Batch) -> Batch:
        return super().example(batch)._replace(prefix_lengths=batch.lengths)

    def width_of(self, net: CoCa) -> int:
        return self.images * net.config.text_width

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        """In nats: "labels" per sample; with a `true_label` also "true_texts" per token of the texts that have it."""
        if self.true_label is None or batch.prefix_lengths is None:
            return super().forward(net, batch)
        states, layout = self.states(net, batch.images, batch.tokens, batch.prefix_lengths)
        ends = self.for_each_image(batch.prefix_lengths) - 1  # (B · n,)
        logits = self.head(self.side_by_side(layout.gather_at(states, ends))).float()
        return {
            self.term: self.loss_of(logits, batch),
            "true_texts": self.loss_of_true_texts(net, batch, states, layout, ends),
        }

    def loss_of_true_texts(self, net: CoCa, batch: Batch, states: Tensor, layout: Layout, ends: Tensor) -> Tensor:
        """The caption loss of the texts whose label is `true_label`, each beside each of its images.

        Args:
            ends: (B · n,) position of the last token of each text, from which none is predicted.
        """
        assert self.true_label is not None
        true_number = self.number(self.true_label)
        is_true = torch.tensor([self.number(captions[0]) == true_number for captions in batch.extras["captions"]])
        predicts = self.for_each_image(is_true)[:, None] & (layout.positions < ends[:, None])  # (B · n, L)
        following = self.for_each_image(batch.tokens).roll(-1, dims=1)[:, : layout.max_length]
        labels = layout.compact(layout.pack(following), predicts)
        if net.tokenizer.unk_id is not None:
            labels = labels.masked_fill(labels == net.tokenizer.unk_id, IGNORED_LABEL)
        vocabulary = expect_decoder(net.decoder).vocabulary.weight
        return caption_loss(layout.compact(states, predicts), vocabulary, labels)

    def features(self, net: CoCa, batch: Batch) -> Tensor | None:
        if batch.prefix_lengths is None:
            return None
        return self.at_ends(net, batch.images, batch.tokens, batch.prefix_lengths)

    def features_of(self, net: CoCa, records: Sequence[Record], images: Images) -> Tensor:
        label = self.classes[0]  # the texts are cut as in training, where the label follows
        rows = []
        for record in records:
            ids, prefix_length = net.tokenizer.encode_answer(record.question, label)
            rows.append(ids[:prefix_length])
        tokens, lengths = padded(rows, net.tokenizer.pad_id)
        return self.at_ends(net, images, tokens.to(net.device), lengths)

    def at_ends(self, net: CoCa, images: Images, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, n · D) for n images of each of B texts; raises `DataError` for another number of images."""
        states, layout = self.states(net, images, tokens, lengths)
        return self.side_by_side(layout.gather_at(states, self.for_each_image(lengths) - 1))

    def states(self, net: CoCa, images: Images, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Layout]:
        """The decoder's states of B · n texts, each beside one of its images, and their layout."""
        if len(images) != self.images * len(tokens):
            raise DataError(
                f"the classifier takes {self.images} images with each text, got {len(images)} images and {len(tokens)} "
                "texts: set model.objectives.NAME.images"
            )
        return net.multimodal_states(images, self.for_each_image(tokens), self.for_each_image(lengths).cpu())

    def for_each_image(self, x: Tensor) -> Tensor:
        """(B, …) -> (B · n, …)"""
        return x.repeat_interleave(self.images, dim=0)

    def side_by_side(self, states: Tensor) -> Tensor:
        """(B · n, D) -> (B, n · D)"""
        return states.unflatten(0, (-1, self.images)).flatten(1)


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
        for row, given in zip(targets, answers, strict=True):
            people = enough_people(given)
            for answer in set(people):
                number = self.class_numbers.get(normalize_answer(answer))
                if number is not None:
                    row[number] = max(row[number].item(), vqa_accuracy(answer, people))
        return targets

"""Objectives: what a batch is trained for. Each maps the network and a batch to named loss terms.

`Pairs` is CoCa's own pair of losses, `Texts` the caption loss of batches that are texts alone,
`coca_lit.training.self_critical.SelfCritical` takes the place of `Pairs` in training, and further objectives join by
name, `model.objectives.NAME._target_=my_parts.mine`: a function (net, batch) -> {name: term}, or an `Objective`. For
captioning only, set `model.contrastive_weight=0`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.distributed import gather_early
from coca_lit.errors import ConfigError, check_number
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, CoCaOutput


class Objective(nn.Module):
    """Loss terms of a batch; a subclass needs `forward` alone. Its parameters, if it has any, are trained together with
    the network's, which it does not hold; they are saved in training checkpoints, and `load_model` ignores them.

    Args:
        weights: the factor of each term in the training loss, by the name of the term; 1 for any other term.

    Attributes:
        trains: the parts of the network that get a gradient from it, such as "decoder.norm". They are not frozen
            when no other loss trains them.
        measures: further numbers about the last batch, by name, logged beside its terms.
        works_with_micro_batches: whether the network may see the batch in micro-batches, see `gradient_caching`.
        works_sharded: whether the weights of the network may be sharded; its `forward` then calls the network as a
            whole, or a method that `shard` registers.
        reads_captions: whether it reads captions, and not just labels and the questions in front of them.
        config_key: where it stands in the configuration.
        owners: the `config_key` of each term that is known so far, of all objectives of a training.
        averages_tokens: whether a term is a mean over tokens. Batches differ in their number, so the mean of two
            batches is not that of the tokens of both.
    """

    trains: Sequence[str] = ()
    works_with_micro_batches = False
    works_sharded = False
    averages_tokens = False
    reads_captions = True
    config_key = "an objective"

    def __init__(self, **weights: float) -> None:
        super().__init__()
        for name, weight in weights.items():
            check_number(f"{name}_weight", weight, at_least=0)
        self.weights = weights
        self.measures: dict[str, float] = {}
        self.owners: dict[str, str] = {}

    @property
    def config(self) -> dict[str, Any]:
        """Plain values that a checkpoint keeps beside the parameters, if those are of use after the training."""
        return {}

    def build(self, net: CoCa) -> None:
        """Creates the parameters, which may depend on the sizes of the network. Called once, before training.

        Raises:
            ValueError: the network lacks what the objective needs.
        """

    def begin(self, net: CoCa) -> None:
        """Called once when the network has its first weights, for example from `init_from`. To keep some of them,
        register buffers in `build` and fill them here: a resumed run has them in its checkpoint.
        """

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        """Raw terms: scalars of this rank, whose mean over ranks is the mean over the global batch."""
        raise NotImplementedError

    def loss(self, net: CoCa, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms, to be differentiated, and the terms themselves.

        Raises:
            ConfigError: there are none, or they have no names, or one that another objective has.
        """
        terms = self.named(self(net, batch))
        if not terms:
            raise ConfigError(f"{self.config_key} returned no term to train: return {{name: term}}")
        return torch.stack([self.weights.get(name, 1.0) * term for name, term in terms.items()]).sum(), terms

    def named(self, terms: Any) -> dict[str, Tensor]:
        """The terms, if they have names of their own; else raises `ConfigError`."""
        if not isinstance(terms, Mapping):
            raise ConfigError(f"{self.config_key} must return {{name: term}}, got a {type(terms).__name__}")
        for name in terms:
            if (owner := self.owners.setdefault(name, self.config_key)) != self.config_key:
                raise ConfigError(f"{self.config_key}: its term '{name}' has the name of a loss of {owner}; rename it")
        return dict(terms)


class Function(Objective):
    """A function of the network and a batch, as an objective. What it trains, its attribute `trains` may say."""

    def __init__(self, function: Callable[[CoCa, Batch], dict[str, Tensor]]) -> None:
        super().__init__()
        self.function = function
        trains = getattr(getattr(function, "func", function), "trains", ())  # also of a partial
        self.trains = (trains,) if isinstance(trains, str) else trains

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        return self.function(net, batch)


class OfFeatures(Objective):
    """Terms of the features of images and texts. They join the pass of `Pairs` through the network, and cost no further
    one; beside `SelfCritical` they have their own.
    """

    works_with_micro_batches = True
    works_sharded = True

    def build(self, net: CoCa) -> None:
        self.trains = [part for part in net.parameters_of_loss("contrastive") if part != "logit_bias"]

    def of_features(self, batch: Batch, images: Tensor, texts: Tensor, logit_scale: Tensor) -> dict[str, Tensor]:
        """Terms as `forward` returns them.

        Args:
            images, texts: (B, E) features of unit length.
            logit_scale: (1,), inverse temperature.
        """
        raise NotImplementedError

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        out = net(batch.images, batch.tokens, batch.lengths, prefix_lengths=batch.prefix_lengths, captioning=False)
        return self.of_features(batch, *features_of(out), out.logit_scale)


class Pairs(Objective):
    """The contrastive and the caption loss of pairs of an image and a text. A weight of 0 skips its loss.

    Args:
        label_smoothing: the share of every target of the caption loss that is spread over the vocabulary, in training.

    Attributes:
        micro_batch_size: pairs that go through the network at a time in training; None for the whole batch.
        joined: objectives of the same features.
    """

    works_with_micro_batches = True
    works_sharded = True
    micro_batch_size: int | None = None

    def __init__(self, contrastive_weight: float, caption_weight: float, label_smoothing: float = 0.0) -> None:
        super().__init__(contrastive=contrastive_weight, caption=caption_weight)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing!r}")
        self.label_smoothing, self.averages_tokens = label_smoothing, caption_weight != 0
        self.joined: tuple[OfFeatures, ...] = ()

    def join(self, objectives: Iterable[OfFeatures]) -> None:
        """Computes them with the features that the pairs get anyway."""
        self.joined = tuple(objectives)
        for made in self.joined:
            self.weights = self.weights | made.weights

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        contrastive = self.weights["contrastive"] != 0
        asked = {"contrastive": contrastive or bool(self.joined), "captioning": self.weights["caption"] != 0}
        further = {"prefix_lengths": batch.prefix_lengths, "on_text_features": gather_early}
        out = net(batch.images, batch.tokens, batch.lengths, **further, **asked)
        terms = loss_terms(out, self.label_smoothing if self.training else 0.0, contrastive)
        if self.joined:
            terms |= self.joined_terms(batch, *features_of(out), out.logit_scale)
        return terms

    def joined_terms(self, batch: Batch, images: Tensor, texts: Tensor, logit_scale: Tensor) -> dict[str, Tensor]:
        """Of all joined objectives, see `OfFeatures.of_features`."""
        terms: dict[str, Tensor] = {}
        for made in self.joined:
            terms |= made.named(made.of_features(batch, images, texts, logit_scale))
        return terms

    def check_norms(self, net: CoCa) -> None:
        """Called before training, after low-rank adaptation, which freezes batch norms, if there is any. Raises
        ValueError if those that train make micro-batches impossible.
        """


class Texts(Objective):
    """The caption loss of texts without images, for which the decoder is a language model."""

    works_with_micro_batches = True  # texts are not split
    works_sharded = True
    averages_tokens = True

    def __init__(self, text_weight: float, label_smoothing: float = 0.0) -> None:
        super().__init__(text=text_weight)
        self.label_smoothing = label_smoothing

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        out = net.captions_of(None, batch.tokens, batch.lengths)
        return {"text": loss_terms(out, self.label_smoothing if self.training else 0.0)["caption"]}


def features_of(out: CoCaOutput) -> tuple[Tensor, Tensor]:
    """Of images and texts (B, E), where they were asked for."""
    assert out.image_features is not None
    assert out.text_features is not None
    return out.image_features, out.text_features


def named_objectives(objectives: Mapping[str, Callable[..., Any] | None]) -> dict[str, Objective]:
    """The objectives added to the network's own, without the names that are None.

    Raises:
        ValueError: one cannot be called, has a weight of 0, or has a term of the same name as another.
    """
    further: dict[str, Objective] = {}
    owners = dict.fromkeys(("contrastive", "caption", "text", "policy"), "coca_lit")
    for name, function in objectives.items():
        if function is None:
            continue
        if not callable(function):
            raise ValueError(f"objectives.{name}: expected an Objective or a function (net, batch), got {function!r}")
        made = further[name] = function if isinstance(function, Objective) else Function(function)
        made.config_key, made.owners = f"model.objectives.{name}", owners
        for term, weight in made.weights.items():
            if weight == 0:
                raise ValueError(f"objectives.{name}: a {term}_weight of 0 trains nothing; set objectives.{name}=null")
            if owners.setdefault(term, made.config_key) != made.config_key:
                raise ValueError(f"objectives.{name}: '{term}' is the name of another loss; choose another one")
    return further

"""Objectives: what a batch is trained for. Each maps what one forward pass has computed to named loss terms.

`Contrastive` and `Captions` are CoCa's own. Others join by name, `model.objectives.NAME._target_=my_parts.mine`:
a function (net, batch) -> {name: term}, or an `Objective`. A `BatchSchedule` brings its own. For
captioning only, set `model.contrastive_weight=0`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.errors import ConfigError, check_number
from coca_lit.losses import caption_loss, contrastive_term
from coca_lit.models import CoCa, CoCaOutput
from coca_lit.models.coca import CAPTION, CONTRASTIVE


class Objective(nn.Module):
    """Loss terms of a batch. A subclass names what it `needs` of the forward pass that all objectives share, and gets
    it: `forward(net, batch, out)`. One that needs nothing of it has `forward(net, batch)`, which calls the network as
    it likes. Both return raw terms by name, scalars of this rank, whose mean over ranks is the mean over the global
    batch.

    Its parameters, if it has any, are trained together with the network's, which it does not hold, and saved in
    training checkpoints. One of a class with `@register_objective("mine")` is kept with the model: `load_model(…,
    imports=[…])` and evaluations find it in `model.objectives`, by its name in the configuration.

    Args:
        weights: the factor of each term in the training loss, by the name of the term; 1 for any other term.

    Attributes:
        needs: fields of `CoCaOutput` that `forward` reads, such as ("pooled", "text_features").
        trains: parts of the network besides those of `needs` that get a gradient from it, such as "decoder.norm". They
            are not frozen when no other loss trains them.
        replaces: names of terms that are not trained beside it. Validation has them, and not this objective.
        micro_batches_add_up: whether its terms are sums over tokens, divided by `out.token_count`. Those of
            micro-batches then add up to those of the batch, and `gradient_caching` keeps nothing for them.
        measures: further numbers about the last batch, by name, logged beside its terms.
        reads_captions: whether it reads captions, and not just labels and the questions in front of them.
        config_key: where it stands in the configuration.
        images: how many it takes with each text.
        averages_tokens: whether a term is a mean over tokens. Batches differ in their number, so the mean of two
            batches is not that of the tokens of both.
    """

    needs: Sequence[str] = ()
    trains: Sequence[str] = ()
    replaces: Sequence[str] = ()
    micro_batches_add_up = False
    averages_tokens = False
    reads_captions = True
    images = 1
    config_key = "an objective"

    def __init__(self, **weights: float) -> None:
        super().__init__()
        for name, weight in weights.items():
            check_number(f"{name}_weight", weight, at_least=0)
        self.weights = weights
        self.measures: dict[str, float] = {}

    @property
    def works_with_micro_batches(self) -> bool:
        """Whether the pass of the others may be split into micro-batches, see `gradient_caching`. One that calls the
        network gets the whole batch all the same.
        """
        return bool(self.needs)

    @property
    def works_sharded(self) -> bool:
        """Whether the weights of the network may be sharded. One that calls the network then calls it as a whole, or a
        method that `shard` registers.
        """
        return bool(self.needs)

    @property
    def is_counted(self) -> bool:
        """Whether `coca-plan` counts its cost, by a step on tensors that have shapes and no values."""
        return bool(self.needs)

    def example(self, batch: Batch) -> Batch:
        """The batch that `coca-plan` gives it, with what it needs beside images and texts."""
        return batch

    @property
    def config(self) -> dict[str, Any]:
        """Of one that is kept with the model, the arguments that build it again, as plain values."""
        return {}

    @classmethod
    def rebuilt(cls, config: Mapping[str, Any]) -> "Objective":
        """One of that `config`, before `build`."""
        return cls(**config)

    def build(self, net: CoCa) -> None:
        """Creates the parameters, which may depend on the sizes of the network. Called once, before training.

        Raises:
            ValueError: the network lacks what the objective needs.
        """

    def begin(self, net: CoCa) -> None:
        """Called once when the network has its first weights, for example from `init_from`. To keep some of them,
        register buffers in `build` and fill them here: a resumed run has them in its checkpoint.
        """

    def check_resumed(self, before: Mapping[str, Any]) -> None:
        """Compares itself with the `config` in the checkpoint that a training resumes from.

        Raises:
            ValueError: its parameters would mean something else.
        """

    def take_data(self, data: Any) -> None:
        """Called once before training, resumed or not, with the DataModule.

        Raises:
            ConfigError: these data lack what the objective needs.
        """

    def takes(self, batch: Batch) -> bool:
        """Whether it has terms of such a batch: here, of one with images."""
        return len(batch.images) > 0

    def trained_parts(self, net: CoCa) -> list[str]:
        """The parts of the network that get a gradient from it: those of what it needs, and what it `trains`. One with
        a pass of its own is taken to train what both losses of CoCa train.
        """
        of_captions = net.parts_for(CAPTION)
        of_both = [part for part in net.parts_for(CONTRASTIVE) if part in of_captions]
        return [*(net.parts_for(self.needs) if self.needs else of_both), *self.trains]


class Function(Objective):
    """A function of the network and a batch, as an objective. What it trains, its attribute `trains` may say."""

    def __init__(self, function: Callable[[CoCa, Batch], dict[str, Tensor]]) -> None:
        super().__init__()
        self.function = function
        trains = getattr(getattr(function, "func", function), "trains", ())  # also of a partial
        self.trains = (trains,) if isinstance(trains, str) else trains

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        return self.function(net, batch)


class Contrastive(Objective):
    """The contrastive loss of pairs of an image and a text, see `contrastive_term`."""

    needs = CONTRASTIVE
    config_key = "model.contrastive_weight"

    def __init__(self, weight: float) -> None:
        super().__init__(contrastive=weight)

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        assert out.image_features is not None
        assert out.text_features is not None
        return {"contrastive": contrastive_term(out.image_features, out.text_features, out.logit_scale, out.logit_bias)}


class Captions(Objective):
    """The caption loss of pairs of an image and a text.

    Args:
        label_smoothing: the share of every target that is spread over the vocabulary, in training.
    """

    needs = CAPTION
    micro_batches_add_up = True
    averages_tokens = True
    config_key = "model.caption_weight"

    def __init__(self, weight: float, label_smoothing: float = 0.0) -> None:
        super().__init__(caption=weight)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing!r}")
        self.label_smoothing = label_smoothing

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, Tensor]:
        return {"caption": caption_term(out, self.label_smoothing if self.training else 0.0)}


def caption_term(out: CoCaOutput, smoothing: float = 0.0) -> Tensor:
    """The caption loss of the labels of a pass."""
    assert out.hidden is not None
    assert out.vocabulary is not None
    assert out.labels is not None
    return caption_loss(out.hidden, out.vocabulary, out.labels, out.token_count, smoothing=smoothing)


class Terms:
    """The terms of the objectives of a batch.

    Attributes:
        values: raw terms by name.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._objectives: dict[str, Objective] = {}  # by name of the term

    def add(self, objective: Objective, terms: Any) -> None:
        """Adds the terms that an objective has returned, to its terms of other micro-batches if there are any.

        Raises:
            ConfigError: they have no names, or one that another objective has, or in training there are none.
        """
        key = objective.config_key
        if not isinstance(terms, Mapping):
            raise ConfigError(f"{key} must return {{name: term}}, got a {type(terms).__name__}")
        if objective.training and not terms:
            raise ConfigError(f"{key} returned no term to train: return {{name: term}}")
        for name, term in terms.items():
            other = self._objectives.setdefault(name, objective)
            if other is not objective:
                raise ConfigError(f"{key}: its term '{name}' has the name of a loss of {other.config_key}; rename it")
            self.values[name] = self.values[name] + term if name in self.values else term

    def weighted_sum(self, objectives: Sequence[Objective]) -> Tensor:
        """Of the terms of some objectives."""
        weighted: list[Tensor] = []
        for name, term in self.values.items():
            objective = self._objectives[name]
            if objective in objectives:
                weighted.append(objective.weights.get(name, 1.0) * term)
        return torch.stack(weighted).sum()

    def detach(self) -> None:
        self.values = {name: term.detach() for name, term in self.values.items()}


def needs_of(objectives: Iterable[Objective]) -> tuple[str, ...]:
    """What they need together of the shared pass; nothing if each has a pass of its own."""
    return tuple(dict.fromkeys(name for objective in objectives for name in objective.needs))


def forward_pass(net: CoCa, batch: Batch, needs: Sequence[str]) -> CoCaOutput:
    """What objectives need of a batch."""
    return net(
        batch.images,
        batch.tokens,
        batch.lengths,
        needs=needs,
        prefix_lengths=batch.prefix_lengths,
        further_tokens=batch.extras.get("further_tokens"),
        further_lengths=batch.extras.get("further_lengths"),
    )


def terms_of(net: CoCa, objectives: Sequence[Objective], batch: Batch) -> Terms:
    """The terms of a batch, with one forward pass for all objectives that need something of it."""
    terms = Terms()
    needs = needs_of(objectives)
    out = forward_pass(net, batch, needs) if needs else None
    for objective in objectives:
        terms.add(objective, objective(net, batch, out) if objective.needs else objective(net, batch))
    return terms


def without_replaced(objectives: Sequence[Objective]) -> list[Objective]:
    """Those that train together: without the ones whose terms another one replaces."""
    replaced = {term for objective in objectives for term in objective.replaces}
    return [objective for objective in objectives if replaced.isdisjoint(objective.weights)]


def check_caption_count(objectives: Sequence[Objective], captions: int) -> None:
    """Raises `ConfigError` if an objective needs several captions of each image and gets one, or if the data give
    several and none reads them. One with a pass of its own may read them in the batch.
    """
    reading = [objective for objective in objectives if "further_text_features" in objective.needs]
    if reading and captions == 1:
        raise ConfigError(f"{reading[0].config_key} needs several captions of each image: set data.captions=2 or more")
    if captions > 1 and not reading and all(objective.needs for objective in objectives):
        raise ConfigError(
            f"data.captions={captions}: no objective reads the further captions; one that needs 'further_text_features'"
            " does"
        )


def named_objectives(objectives: Mapping[str, Callable[..., Any] | None]) -> dict[str, Objective]:
    """The objectives that are added to CoCa's own, without the names that are None.

    Raises:
        ValueError: one cannot be called, or has no weight above 0.
    """
    configured: dict[str, Objective] = {}
    for name, function in objectives.items():
        if function is None:
            continue
        if not callable(function):
            raise ValueError(f"objectives.{name}: expected an Objective or a function (net, batch), got {function!r}")
        objective = function if isinstance(function, Objective) else Function(function)
        objective.config_key = f"model.objectives.{name}"
        configured[name] = objective
        if objective.weights and not any(objective.weights.values()):
            zero = " and ".join(f"{term}_weight" for term in objective.weights)
            raise ValueError(f"objectives.{name}: a {zero} of 0 trains nothing; set objectives.{name}=null")
    return configured


def check_names_of_terms(objectives: Iterable[Objective]) -> None:
    """Raises ValueError if two objectives have a term of the same name, as far as their weights tell."""
    owners: dict[str, str] = {}
    for objective in objectives:
        for term in objective.weights:
            key = objective.config_key.removeprefix("model.")
            if owners.setdefault(term, key) != key:
                raise ValueError(f"{key}: '{term}' is the name of another loss; choose another one")

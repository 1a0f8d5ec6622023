"""Objectives: what a batch is trained for. Each maps the network and a batch to named loss terms.

`Pairs` is CoCa's own pair of losses, `Texts` the caption loss of batches that are texts alone,
`coca_lit.training.self_critical.SelfCritical` takes the place of `Pairs` in training, and further objectives join by
name: `model.objectives.NAME._target_=my_package.MyObjective`. For captioning only, set `model.contrastive_weight=0`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from coca_lit.data.batch import Batch, padded
from coca_lit.distributed import gather_early
from coca_lit.errors import check_number
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa
from coca_lit.models.packing import to_device


class Objective(nn.Module, ABC):
    """Loss terms of a batch. Its parameters, if it has any, are trained together with the network's, which it does not
    hold; they are saved in training checkpoints, and `load_model` ignores them.

    Args:
        weights: the factor of each term in the training loss, by the name of the term.

    Attributes:
        trains: the parts of the network that get a gradient from it, such as "decoder.norm". They are not frozen
            when no other loss trains them.
        measures: further numbers about the last batch, by name, logged beside its terms.
    """

    trains: Sequence[str] = ()

    def __init__(self, **weights: float) -> None:
        super().__init__()
        for name, weight in weights.items():
            check_number(f"{name}_weight", weight, at_least=0)
        self.weights = weights
        self.measures: dict[str, float] = {}

    def build(self, net: CoCa) -> None:
        """Creates the parameters, which may depend on the sizes of the network. Called once, before training.

        Raises:
            ValueError: the network lacks what the objective needs.
        """

    @abstractmethod
    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        """Raw terms: scalars of this rank, whose mean over ranks is the mean over the global batch."""

    def loss(self, net: CoCa, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms, to be differentiated, and the terms themselves."""
        terms = self(net, batch)
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum(), terms


class Pairs(Objective):
    """The contrastive and the caption loss of pairs of an image and a text. A weight of 0 skips its loss.

    Args:
        label_smoothing: the share of every target of the caption loss that is spread over the vocabulary, in training.
        micro_batch_size: pairs that go through the network at a time in training, see `gradient_caching`; None for the
            whole batch.
    """

    def __init__(
        self,
        contrastive_weight: float,
        caption_weight: float,
        label_smoothing: float = 0.0,
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__(contrastive=contrastive_weight, caption=caption_weight)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing!r}")
        self.label_smoothing, self.micro_batch_size = label_smoothing, micro_batch_size

    def build(self, net: CoCa) -> None:
        if net.decoder is None:  # a CLIP does not caption
            self.weights["caption"] = 0.0

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        asked = {"contrastive": self.weights["contrastive"] != 0, "captioning": self.weights["caption"] != 0}
        further = {"prefix_lengths": batch.prefix_lengths, "on_text_features": gather_early}
        out = net(batch.images, batch.tokens, batch.lengths, **further, **asked)
        return loss_terms(out, self.label_smoothing if self.training else 0.0)

    def loss(self, net: CoCa, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.micro_batch_size is None:
            return super().loss(net, batch)
        from coca_lit.training.gradient_caching import cached_loss

        pairs, size = (batch.images, batch.tokens, batch.lengths), self.micro_batch_size
        return cached_loss(net, *pairs, size, self.weights, batch.prefix_lengths, self.label_smoothing)


class Texts(Objective):
    """The caption loss of texts without images, for which the decoder is a language model."""

    def __init__(self, text_weight: float, label_smoothing: float = 0.0) -> None:
        super().__init__(text=text_weight)
        self.label_smoothing = label_smoothing

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        out = net(None, batch.tokens, batch.lengths)
        return {"text": loss_terms(out, self.label_smoothing if self.training else 0.0)["caption"]}


class ParallelPrediction(Objective):
    """Caption loss with masked inputs (CapPa: Tschannen et al. 2023, arXiv 2306.07915). For a share of the pairs of a
    batch the text side reads start tokens in the place of the caption, so every token is predicted from the image and
    its position alone, and the image features must carry all of it. The other pairs have the usual caption loss, and so
    have all pairs in evaluation.

    With `contrastive_weight=0 caption_weight=0` it is CapPa itself. As in CoCa, tokens attend to those before them; the
    paper lets masked ones attend to all, which are as empty.

    Args:
        share: of the pairs whose captions are masked; 0.75 in the paper.
        weight: factor of the loss.
    """

    def __init__(self, share: float = 0.75, weight: float = 1.0) -> None:
        super().__init__(parallel=weight)
        check_number("share", share, above=0, at_most=1)
        self.share = share

    def build(self, net: CoCa) -> None:
        self.trains = _caption_parts(net)

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        read = None
        if self.training:
            masked = torch.rand(len(batch.tokens), device=batch.tokens.device) < self.share  # (B,)
            positions = torch.arange(batch.tokens.shape[1], device=masked.device)
            given = 1 if batch.prefix_lengths is None else batch.prefix_lengths[:, None].to(masked.device)
            read = batch.tokens.masked_fill(masked[:, None] & (positions >= given), net.tokenizer.sot_id)
        return {"parallel": _caption_term(net, batch, read=read)}


class PrefixPrompts(Objective):
    """Caption loss of captions behind a prompt, which is read and not predicted. `generate.prompt` then asks for the
    kind of caption that a prompt stands for.

    Args:
        prompts: each caption gets one of them at random, in evaluation the first.
        weight: factor of the loss.
    """

    ids: Tensor

    def __init__(self, prompts: Sequence[str], weight: float = 1.0) -> None:
        super().__init__(prefixed=weight)
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not self.prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in self.prompts):
            raise ValueError(f"prompts must be one or more texts with words, got {prompts!r}")

    def build(self, net: CoCa) -> None:
        self.trains = _caption_parts(net)
        rows = [ids[1:-1] for ids in net.tokenizer.encode_batch(self.prompts)]
        if max(map(len, rows)) > net.tokenizer.context_length // 2:
            raise ValueError(f"a prompt takes more than half of the context of {net.tokenizer.context_length} tokens")
        ids, self.lengths = padded(rows, net.tokenizer.pad_id)  # (P, p), and (P,), which stays on the host
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, net: CoCa, batch: Batch) -> dict[str, Tensor]:
        count = len(batch.tokens)
        which = torch.randint(len(self.prompts), (count,)) if self.training else torch.zeros(count, dtype=torch.long)
        return {"prefixed": _caption_term(net, self.with_prompts(net, batch, which))}

    def with_prompts(self, net: CoCa, batch: Batch, which: Tensor) -> Batch:
        """The batch with a prompt between the start and the rest of each text; texts that become too long are cut.

        Args:
            which: (B,) number of the prompt of each text, on the host.
        """
        tokens, context = batch.tokens, net.tokenizer.context_length
        lengths = (batch.lengths + self.lengths[which]).clamp(max=context)
        prefix_lengths = self.lengths[which] + (1 if batch.prefix_lengths is None else batch.prefix_lengths)
        prompts = self.ids[to_device(which, tokens.device)]  # (B, p)
        added, ends = (to_device(x, tokens.device)[:, None] for x in (self.lengths[which], lengths))  # (B, 1)
        positions = torch.arange(min(tokens.shape[1] + prompts.shape[1], context), device=tokens.device)  # (T,)
        from_prompt = prompts.gather(1, (positions - 1).clamp(0, prompts.shape[1] - 1).expand(len(tokens), -1))
        from_text = tokens.gather(1, (positions - added).clamp(0, tokens.shape[1] - 1))
        new = torch.where((positions >= 1) & (positions <= added), from_prompt, from_text)
        new = new.scatter(1, ends - 1, net.tokenizer.eot_id).masked_fill(positions >= ends, net.tokenizer.pad_id)
        return batch._replace(tokens=new, lengths=lengths, prefix_lengths=prefix_lengths)


def _caption_parts(net: CoCa) -> list[str]:
    """What a caption loss alone trains; raises ValueError for a network without a decoder."""
    if net.decoder is None:
        raise ValueError("a caption loss needs a decoder, which a model with decoder_layers=0 lacks")
    return net.parameters_of_loss("caption")


def _caption_term(net: CoCa, batch: Batch, read: Tensor | None = None) -> Tensor:
    asked = {"contrastive": False, "prefix_lengths": batch.prefix_lengths, "read": read}
    return loss_terms(net(batch.images, batch.tokens, batch.lengths, **asked))["caption"]


def named_objectives(objectives: Mapping[str, Objective | None]) -> dict[str, Objective]:
    """The objectives added to the network's own, without the names that are None.

    Raises:
        ValueError: one is no objective, has a weight of 0, or has a term of the same name as another.
    """
    further = {name: made for name, made in objectives.items() if made is not None}
    terms = ["contrastive", "caption", "text", "policy"]
    for name, made in further.items():
        if not isinstance(made, Objective):
            raise ValueError(f"objectives.{name}: expected a coca_lit.training.objectives.Objective, got {made!r}")
        for term, weight in made.weights.items():
            if weight == 0:
                raise ValueError(f"objectives.{name}: a {term}_weight of 0 trains nothing; set objectives.{name}=null")
            if term in terms:
                raise ValueError(f"objectives.{name}: '{term}' is the name of another loss; choose another one")
            terms.append(term)
    return further


def check_pairs(pairs: Pairs, net: CoCa, further: bool) -> None:
    """Checks `pairs` once it is known what of the network is frozen.

    Args:
        further: whether other objectives join.

    Raises:
        ValueError: no loss is left, or micro-batches are impossible.
    """
    if not any(pairs.weights.values()) and not further:
        raise ValueError(
            "no loss is left to train with: at least one of contrastive_weight and caption_weight must be above 0"
        )
    if pairs.micro_batch_size is not None:
        from coca_lit.training.gradient_caching import check_micro_batches

        check_micro_batches(net, pairs.micro_batch_size)
        if further:
            raise ValueError("micro_batch_size does not work with further objectives, which need the whole batch")

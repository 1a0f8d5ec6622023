"""A large batch in small memory: the losses of a whole batch, computed in micro-batches (GradCache, Gao et al. 2021,
arXiv 2101.06983).

The contrastive loss couples all pairs, so the batch cannot simply be split. But its gradient with respect to the
parameters passes through the features, which are small:

1. features of every micro-batch, without a graph
2. contrastive loss of all features, and its gradient with respect to each feature
3. each micro-batch again, with a graph: the parameters get the gradient of (features · gradient of 2) + caption loss

The result is an ordinary differentiable loss whose gradients are already known. Accumulation, clipping, mixed precision
in bf16 and DistributedDataParallel see one backward pass. The memory of activations is that of one micro-batch, at the
price of a second forward pass through the two towers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.distributed import forked_rng, sum_over_ranks
from coca_lit.errors import ConfigError, check_number
from coca_lit.losses import caption_loss, contrastive_term
from coca_lit.losses.gradients import with_gradients
from coca_lit.models import CoCa, CoCaOutput
from coca_lit.models.inputs import Images
from coca_lit.models.packing import to_device
from coca_lit.training.objectives import Pairs, features_of

FeatureTerms = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""(images (B, E), texts (B, E), logit_scale (1,)) -> terms by name."""


class MicroBatchedPairs(Pairs):
    """`Pairs` whose batches go through the network `size` pairs at a time in training."""

    def __init__(self, size: int, *weights: float) -> None:
        super().__init__(*weights)
        check_number("micro_batch_size", size, whole=True, at_least=1)
        self.micro_batch_size: int = size

    def loss(self, net: CoCa, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        pairs, smoothing = (batch.images, batch.tokens, batch.lengths), self.label_smoothing
        joined = partial(self.joined_terms, batch) if self.joined else None
        own = [p for made in self.joined for p in made.parameters()]
        size, weights = self.micro_batch_size, self.weights
        return cached_loss(net, *pairs, size, weights, batch.prefix_lengths, smoothing, joined, own)

    def check_norms(self, net: CoCa) -> None:
        """They would see micro-batches instead of batches."""
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.trained_modules()):
            raise ValueError(
                f"micro_batch_size does not work with the batch norms of {net.config.image_encoder}: freeze the"
                " encoder (model.freeze=[image_encoder]) or choose one without them"
            )


class MicroBatch(NamedTuple):
    """Some pairs of the batch."""

    images: Images  # (b, 3, H, W), or `Patches`
    tokens: Tensor  # (b, L)
    lengths: Tensor  # (b,)
    prefix_lengths: Tensor  # (b,), leading tokens that are not predicted
    seed: int  # of dropout: both passes must drop the same units


def cached_loss(
    net: CoCa,
    images: Images,
    tokens: Tensor,
    lengths: Tensor,
    size: int,
    weights: Mapping[str, float],
    prefix_lengths: Tensor | None = None,
    smoothing: float = 0.0,
    joined: FeatureTerms | None = None,
    further: Iterable[nn.Parameter] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses of a batch, to be differentiated, and the raw terms with a weight above 0.

    Args:
        images, tokens, lengths, prefix_lengths: the batch of this rank, as `CoCa.forward` takes it; B must be a
            multiple of `size`.
        size: pairs that go through the network at a time.
        weights: of "contrastive" and "caption"; a loss with a weight of 0 is not computed.
        smoothing: of the caption loss.
        joined: further terms of the features, whose weights are 1 where `weights` has none.
        further: parameters of these terms, beyond the network's.

    Raises:
        ConfigError: B is no multiple of `size`.
    """
    if len(images) % size:
        raise ConfigError(
            f"trainer.micro_batch_size={size} does not divide a batch of {len(images)}: a loader of your own needs "
            "drop_last=True"
        )
    prefix_lengths = torch.ones_like(lengths) if prefix_lengths is None else prefix_lengths
    parts = micro_batches(images, tokens, lengths, prefix_lengths, size)
    parameters = [p for p in (*net.parameters(), *further) if p.requires_grad]
    terms: dict[str, Tensor] = {}
    grad_features = None
    with _collected_gradients(parameters) as gradients:
        if weights["contrastive"] or joined is not None:
            terms, grad_features = _of_features(net, parts, weights, joined)
        total_tokens = sum_over_ranks(predicted_tokens(net, tokens, lengths, prefix_lengths))
        for i, part in enumerate(parts):
            out = _forward(net, part, contrastive=grad_features is not None, captioning=weights["caption"] != 0)
            share = []
            if grad_features is not None:
                share += [(f * g[i]).sum() for f, g in zip(features_of(out), grad_features, strict=True)]
            if out.hidden is not None and out.vocabulary is not None and out.labels is not None:
                caption = caption_loss(out.hidden, out.vocabulary, out.labels, total_tokens, smoothing=smoothing)
                terms["caption"] = terms.get("caption", 0) + caption.detach()
                share += [weights["caption"] * caption]
            torch.stack(share).sum().backward()
    loss = _weighted(terms, weights)
    return with_gradients(loss, gradients, parameters, once=True), terms


def micro_batches(
    images: Images, tokens: Tensor, lengths: Tensor, prefix_lengths: Tensor, size: int
) -> list[MicroBatch]:
    seeds = torch.randint(2**62, (len(images) // size,)).tolist()
    tensors = (part.split(size) for part in (images, tokens, lengths, prefix_lengths))
    return [MicroBatch(*part) for part in zip(*tensors, seeds, strict=True)]


def predicted_tokens(net: CoCa, tokens: Tensor, lengths: Tensor, prefix_lengths: Tensor) -> Tensor:
    """Number of tokens that the caption loss averages over: all after the prefix, without unknown words."""
    positions, lengths, prefix_lengths = torch.arange(tokens.shape[1]), lengths.cpu(), prefix_lengths.cpu()
    predicted = (positions >= prefix_lengths[:, None]) & (positions < lengths[:, None])  # (B, L), on the host
    predicted, unknown = to_device(predicted, tokens.device), net.tokenizer.unk_id
    return (predicted if unknown is None else predicted & (tokens != unknown)).sum()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of the CPU and the device start from `seed` inside the block and continue as before after it."""
    with forked_rng(device):
        torch.manual_seed(seed)
        yield


def _forward(net: CoCa, part: MicroBatch, contrastive: bool, captioning: bool) -> CoCaOutput:
    # The decoder draws its random numbers after the towers, so these draw the same ones with and without it.
    with seeded(part.seed, net.device):
        asked = {"contrastive": contrastive, "captioning": captioning}
        return net(part.images, part.tokens, part.lengths, prefix_lengths=part.prefix_lengths, **asked)


def _of_features(
    net: CoCa, parts: Sequence[MicroBatch], weights: Mapping[str, float], joined: FeatureTerms | None
) -> tuple[dict[str, Tensor], list[Sequence[Tensor]]]:
    """The terms of all features, and the gradients of their weighted sum with respect to image and text features, by
    micro-batch. Temperature and bias, which are not in the second pass, get their gradients here.
    """
    with torch.no_grad():
        found = [features_of(_forward(net, part, contrastive=True, captioning=False)) for part in parts]
    torch.clear_autocast_cache()  # it holds weights that were cast without a graph
    features = [torch.cat(side).requires_grad_() for side in zip(*found, strict=True)]  # (B, E), images and texts
    images, texts = features
    terms, scale = {}, net.logit_scale.exp()
    if weights["contrastive"]:
        terms["contrastive"] = contrastive_term(images, texts, scale, net.logit_bias)
    if joined is not None:
        terms |= joined(images, texts, scale)
    _weighted(terms, weights).backward()
    grad_features = [torch.zeros_like(f) if f.grad is None else f.grad for f in features]
    split = [gradient.split(len(parts[0].images)) for gradient in grad_features]
    return {name: term.detach() for name, term in terms.items()}, split


def _weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    return torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()


@contextmanager
def _collected_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor | None]]:
    """Backward passes inside the block leave `grad` of the parameters alone; the list gets their sum.

    DistributedDataParallel ignores them: it waits for gradients only after its own forward pass, and this is inside it.
    """
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    found: list[Tensor | None] = []
    try:
        yield found
        found += [p.grad for p in parameters]
    finally:
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient

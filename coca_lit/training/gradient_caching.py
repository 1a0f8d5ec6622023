"""A large batch in small memory: the losses of a whole batch, computed in micro-batches (GradCache, Gao et al. 2021,
arXiv 2101.06983).

The contrastive loss couples all pairs, so the batch cannot simply be split. But its gradient with respect to the
parameters passes through the features, which are small. So it is with every objective and what it needs of the forward
pass:

1. what objectives need of every micro-batch, without a graph
2. their losses of the whole batch, and the gradients with respect to the tensors of 1
3. each micro-batch again, with a graph: the parameters get the gradient of (tensors · gradients of 2) + caption loss

The caption loss adds up over micro-batches, so it is computed in 3 and needs nothing of 1.

The result is an ordinary differentiable loss whose gradients are already known. Accumulation, clipping, mixed precision
in bf16 and DistributedDataParallel see one backward pass. The memory of activations is that of one micro-batch, at the
price of a second forward pass through the two towers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coca_lit.data.batch import Batch
from coca_lit.distributed import forked_rng, sum_over_ranks
from coca_lit.errors import ConfigError
from coca_lit.losses.gradients import with_gradients
from coca_lit.models import CoCa, CoCaOutput
from coca_lit.models.packing import to_device
from coca_lit.training.objectives import Objective, Terms, forward_pass, needs_of

ALWAYS = ("logit_scale", "logit_bias")  # outputs that cost nothing
SHARED = (*ALWAYS, "vocabulary")  # outputs that all micro-batches have in common


class MicroBatch(NamedTuple):
    """Some samples of the batch."""

    batch: Batch
    seed: int  # of dropout: both passes must drop the same units


def cached_loss(net: CoCa, objectives: Sequence[Objective], batch: Batch, size: int) -> tuple[Tensor, Terms]:
    """The weighted sum of the losses of a batch, to be differentiated, and the terms of its objectives. Those that need
    nothing of the forward pass get the whole batch.

    Args:
        batch: of this rank; the number of its samples must be a multiple of `size`.
        size: samples that go through the network at a time.

    Raises:
        ConfigError: it is no multiple.
    """
    terms = Terms()
    losses: list[Tensor] = []
    sharing = [objective for objective in objectives if objective.needs]
    with_own_pass = [objective for objective in objectives if not objective.needs]
    if sharing:
        losses.append(_of_shared_pass(net, sharing, batch, size, terms))
    for objective in with_own_pass:
        terms.add(objective, objective(net, batch))
    if with_own_pass:
        losses.append(terms.weighted_sum(with_own_pass))
    return torch.stack(losses).sum(), terms


def _of_shared_pass(net: CoCa, objectives: Sequence[Objective], batch: Batch, size: int, terms: Terms) -> Tensor:
    """The weighted sum of the losses of objectives that share a forward pass. Adds their terms to `terms`."""
    parts = micro_batches(batch, size)
    needs = needs_of(objectives)
    coupled = [objective for objective in objectives if not objective.micro_batches_add_up]
    adding_up = [objective for objective in objectives if objective.micro_batches_add_up]
    of_objectives = [p for objective in objectives for p in objective.parameters()]
    parameters = [p for p in (*net.parameters(), *of_objectives) if p.requires_grad]
    with _collected_gradients(parameters) as gradients:
        of_outputs: list[dict[str, Tensor]] = [{} for _ in parts]
        if coupled:
            of_outputs = _gradients_of_outputs(net, coupled, batch, parts, needs, terms)
        token_count = sum_over_ranks(label_count(net, batch)) if adding_up else None
        for part, gradients_of_part in zip(parts, of_outputs, strict=True):
            out = _forward(net, part, needs)._replace(token_count=token_count)
            addends = [(getattr(out, name) * gradient).sum() for name, gradient in gradients_of_part.items()]
            for objective in adding_up:
                terms_of_part = objective(net, part.batch, out)
                terms.add(objective, terms_of_part)
                addends += [objective.weights.get(name, 1.0) * term for name, term in terms_of_part.items()]
            torch.stack(addends).sum().backward()
            terms.detach()
    return with_gradients(terms.weighted_sum(objectives), gradients, parameters, once=True)


def _gradients_of_outputs(
    net: CoCa,
    objectives: Sequence[Objective],
    batch: Batch,
    parts: Sequence[MicroBatch],
    needs: Sequence[str],
    terms: Terms,
) -> list[dict[str, Tensor]]:
    """For each micro-batch the gradients of the losses of some objectives with respect to what these need of the pass.
    Adds their terms to `terms`, and the gradients of their own parameters to those.

    Args:
        needs: what the second pass will compute.
    """
    coupled_needs = needs_of(objectives)
    first_needs = [name for name in needs if name != "hidden" or name in coupled_needs]
    if "hidden" in needs and not {"hidden", "text_features", "text_states"}.intersection(first_needs):
        first_needs.append("text_states")  # the texts are read before the images, and draw random numbers, too
    with torch.no_grad():
        outs = [_forward(net, part, first_needs) for part in parts]
    torch.clear_autocast_cache()  # it holds weights that were cast without a graph
    kept = {*ALWAYS, *coupled_needs, "labels"}
    cached = {name: _Cached(name, outs) for name in kept if getattr(outs[0], name) is not None}
    out_of_batch = CoCaOutput(None, None, cached["logit_scale"].of_batch)
    out_of_batch = out_of_batch._replace(**{name: output.of_batch for name, output in cached.items()})
    del outs
    for objective in objectives:
        terms.add(objective, objective(net, batch, out_of_batch))
    terms.weighted_sum(objectives).backward()
    terms.detach()
    of_outputs: list[dict[str, Tensor]] = [{} for _ in parts]
    for name, output in cached.items():
        for gradients_of_part, gradient in zip(of_outputs, output.gradients(), strict=False):
            gradients_of_part[name] = gradient
    return of_outputs


class _Cached:
    """An output of the first pass, of all micro-batches together.

    Attributes:
        of_batch: a leaf of the graph.
    """

    def __init__(self, name: str, outs: Sequence[CoCaOutput]) -> None:
        tensors = [getattr(out, name) for out in outs]
        if not isinstance(tensors[0], Tensor):
            raise ConfigError(
                f"trainer.micro_batch_size does not work with an objective that needs '{name}' of another kind of "
                "input than images of one shape"
            )
        self._sizes = None if name in SHARED else [len(tensor) for tensor in tensors]
        self.of_batch: Tensor = tensors[0].detach() if name in SHARED else torch.cat(tensors)
        if self.of_batch.is_floating_point():
            self.of_batch.requires_grad_()

    def gradients(self) -> Sequence[Tensor]:
        """Of each micro-batch; of what they share of the first one alone. None at all of a constant."""
        gradient = self.of_batch.grad
        if self._sizes is None:
            return [] if gradient is None else [gradient]
        if not self.of_batch.requires_grad:
            return []
        return (torch.zeros_like(self.of_batch) if gradient is None else gradient).split(self._sizes)


def micro_batches(batch: Batch, size: int) -> list[MicroBatch]:
    """Raises `ConfigError` if the number of samples is no multiple of `size`."""
    count = len(batch.tokens)
    if count % size:
        raise ConfigError(
            f"trainer.micro_batch_size={size} does not divide a batch of {count}: a loader of your own needs "
            "drop_last=True"
        )
    seeds = torch.randint(2**62, (count // size,)).tolist()
    starts = range(0, count, size)
    return [MicroBatch(batch.rows(start, start + size), seed) for start, seed in zip(starts, seeds, strict=True)]


def label_count(net: CoCa, batch: Batch) -> Tensor:
    """Number of labels that the caption loss averages over: all tokens after the prefix, without unknown words."""
    tokens = batch.tokens
    positions = torch.arange(tokens.shape[1])
    lengths = batch.lengths.cpu()
    starts = torch.ones_like(lengths) if batch.prefix_lengths is None else batch.prefix_lengths.cpu()
    is_label = (positions >= starts[:, None]) & (positions < lengths[:, None])  # (B, L), on the host
    is_label = to_device(is_label, tokens.device)
    if net.tokenizer.unk_id is not None:
        is_label = is_label & (tokens != net.tokenizer.unk_id)
    return is_label.sum()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of the CPU and the device start from `seed` inside the block and continue as before after it."""
    with forked_rng(device):
        torch.manual_seed(seed)
        yield


def check_norms(net: CoCa) -> None:
    """Raises ValueError if batch norms train: they would see micro-batches instead of batches."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.trained_modules()):
        raise ValueError(
            f"micro_batch_size does not work with the batch norms of {net.config.image_encoder}: freeze the"
            " encoder (model.freeze=[image_encoder]) or choose one without them, such as"
            " model.net.image_encoder=vit_tiny_patch16_224"
        )


def _forward(net: CoCa, part: MicroBatch, needs: Sequence[str]) -> CoCaOutput:
    # The decoder draws its random numbers after the towers, so these draw the same ones with and without it.
    with seeded(part.seed, net.device):
        return forward_pass(net, part.batch, needs)


@contextmanager
def _collected_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor | None]]:
    """Backward passes inside the block leave `grad` of the parameters alone; the list gets their sum.

    DistributedDataParallel ignores them: it waits for gradients only after its own forward pass, and this is inside it.
    """
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    gradients: list[Tensor | None] = []
    try:
        yield gradients
        gradients += [p.grad for p in parameters]
    finally:
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient

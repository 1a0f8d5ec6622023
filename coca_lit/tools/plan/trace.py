"""One training step of the real network and losses on tensors without storage: every operator runs, none computes.

Weights, images and everything computed from them are fake (`FakeTensorMode`). Token ids, lengths and masks are real,
so that code which reads their values runs as in training. Frozen parts, loss weights, precision, recomputation and any
image encoder therefore count as they do in training. PyTorch's `FlopCounterMode` counts the FLOPs; memory is the most
that the step holds at once. All captions have the same, mean length: packed captions cost what their tokens cost.

The kernels for CPUs are off. What is left differs from a GPU's step in the layout of the texts alone: `on_gpu` adds the
grid of attention where there is one.
"""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from coca_lit.data.batch import Batch
from coca_lit.data.inputs import IMAGES, ImageReader
from coca_lit.losses import loss_terms
from coca_lit.losses.caption import CHUNK, GPU_CHUNK
from coca_lit.models import CoCa, kernels
from coca_lit.models.coca import CAPTION, CONTRASTIVE
from coca_lit.models.inputs import largest_shape
from coca_lit.training.objectives import Objective, caption_term, forward_pass, needs_of

BATCHES = (64, 128)  # the difference of their peaks is the memory per sample; both exceed a chunk of the losses
PARTS = {  # part of the plan -> modules of the network
    "image encoder": ("image_encoder",),
    "pooling": ("pooling", "image_projection"),
    "text tower": ("text",),
    "decoder": ("decoder",),
}


class Step(NamedTuple):
    """A training step of some batch, without the optimizer. A multiply-add counts as 2 FLOPs."""

    forward: dict[str, int]  # FLOPs by part
    total: int  # FLOPs of forward and backward pass, recomputation included
    operations: int  # that a device is given
    peak: int  # bytes of activations and temporary tensors, without weights, gradients and inputs


class Cost(NamedTuple):
    """The cost of a training step, per sample."""

    forward: dict[str, float]  # FLOPs by part
    total: float  # FLOPs of forward and backward pass
    activations: float  # bytes
    fixed: float  # bytes at any batch size: casts of weights, chunks of the losses
    operations: int = 0  # of a step, whatever the number of samples


def cost(
    net: CoCa,
    weights: Mapping[str, float],
    caption_tokens: int,
    autocast: torch.dtype | None,
    objectives: Sequence[Objective] = (),
    reader: ImageReader = IMAGES,
    captions: int = 1,
) -> Cost:
    """The cost of a sample in a large batch.

    Args:
        net: on the meta device; its parameters are replaced.
        weights: of the losses "contrastive" and "caption"; a loss of weight 0 is skipped.
        caption_tokens: mean length of the captions, start and end included.
        autocast: type of mixed precision; None computes in the type of the weights.
        objectives: further ones that can be counted; their texts are as long as captions.
        reader: of the kind of input.
        captions: of each image.
    """
    few, many = BATCHES
    low, high = (
        trace(net, weights, caption_tokens, autocast, batch, objectives, reader, captions) for batch in BATCHES
    )
    slope = (high.peak - low.peak) / (many - few)
    forward = {part: flops / few for part, flops in low.forward.items()}
    return Cost(forward, low.total / few, slope, max(low.peak - few * slope, 0.0), low.operations)


def on_gpu(net: CoCa, spent: Cost, caption_tokens: int, bytes_of_number: int) -> Cost:
    """The cost on a GPU, where the chunks of the caption loss are larger. Attention in fp32 or with a mask sees a batch
    of captions as a grid as wide as the context, since in a large batch some caption is that long; half precision
    without a mask goes without the grid, see `coca_lit.models.kernels.fast_attention`.

    Args:
        bytes_of_number: of activations, 2 in half precision.
    """
    sizes = net.config
    width = sizes.text_width
    decoders = sizes.decoder_layers
    longest = sizes.context_length
    half = bytes_of_number == 2
    text_on_grid = 0 if half and sizes.cls_mask == "correct" else sizes.text_layers
    decoders_on_grid = 0 if half else decoders
    layers = [(text_on_grid, longest + 1, caption_tokens + 1), (decoders_on_grid, longest - 1, caption_tokens - 1)]
    products, rows = 0, 0  # of a sample, in addition to its tokens'
    for count, wide, narrow in layers:
        products += count * 4 * width * (wide**2 - narrow**2)
        rows += count * 4 * (wide - narrow)  # of queries, keys, values and results
    products += decoders_on_grid * 4 * width * sizes.pooler_queries * (longest - caption_tokens)
    rows += decoders_on_grid * 2 * (longest - caption_tokens)  # of queries and results
    logits = GPU_CHUNK - CHUNK if decoders else 0  # and their softmax, both in fp32, and their gradient
    return spent._replace(
        total=spent.total + 3 * products,
        activations=spent.activations + rows * width * bytes_of_number,
        fixed=spent.fixed + logits * (8 + bytes_of_number),
    )


def trace(
    net: CoCa,
    weights: Mapping[str, float],
    caption_tokens: int,
    autocast: torch.dtype | None,
    batch: int,
    objectives: Sequence[Objective] = (),
    reader: ImageReader = IMAGES,
    captions: int = 1,
) -> Step:
    """A step with `batch` samples. Its FLOPs are without the contrastive logits, which grow with the global batch.
    Arguments as for `cost`.
    """
    totals: dict[str, int] = {}
    modules: dict[str, int] = {}

    def mark(end_of: str) -> None:
        totals[end_of] = counter.get_total_flops()
        if end_of in ("network", "objectives"):
            modules.update({name: sum(found.values()) for name, found in counter.get_flop_counts().items()})

    step = _Step(net, weights, objectives, reader, captions)
    inputs = _inputs(step, caption_tokens, batch)
    grads = [p.grad for p in step.parameters() if p.grad is not None]
    # In this order: the counter of FLOPs hands on the parts of an operation in its place.
    gc.freeze()  # what is there already is no garbage: collecting is then fast
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with kernels.disabled(), counter, _Recorder([*inputs, *step.parameters(), *step.buffers()], grads) as recorder:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = step(*inputs, mark)
        recorder.collects = True
        loss.backward()
    gc.unfreeze()
    vocabulary = totals["caption"] - totals["network"]
    found = {part: sum(modules.get(f"_Step.net.{name}", 0) for name in names) for part, names in PARTS.items()}
    forward = {part: flops for part, flops in found.items() if part != "decoder" or flops}
    forward |= {"vocabulary, with its gradients": vocabulary} if vocabulary else {}
    if objectives:
        own = [f"_Step.objectives.{i}.{name}" for i, made in enumerate(objectives) for name, _ in made.named_children()]
        forward["objectives"] = sum(modules.get(name, 0) for name in own)
    total = counter.get_total_flops() - (totals["contrastive"] - totals["caption"])
    return Step(forward, total, recorder.operations, recorder.peak)


class _Step(nn.Module):
    """The losses of a training step. One module, so that the counter of FLOPs knows the names of its parts."""

    def __init__(
        self,
        net: CoCa,
        weights: Mapping[str, float],
        objectives: Sequence[Objective],
        reader: ImageReader,
        captions: int,
    ) -> None:
        super().__init__()
        self.reader = reader
        self.captions = captions
        self.net = net
        self.weights = weights
        self.objectives = nn.ModuleList(objectives)
        self.shared = [objective for objective in objectives if objective.needs]
        self.own = [objective for objective in objectives if not objective.needs]

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor, mark: Callable[[str], None]) -> Tensor:
        """`mark` is called at the end of the network and of each loss, computed or not."""
        terms: list[Tensor] = []
        needs = [*needs_of(self.shared)]
        if self.weights["contrastive"]:
            needs += CONTRASTIVE
        if self.weights["caption"]:
            needs += CAPTION
        given = self.reader.batch(images)
        batch = Batch(given[: len(tokens)], tokens, lengths, [])
        if self.captions > 1:
            shape = (len(tokens), self.captions - 1)
            further_tokens = tokens[:, None].expand(*shape, -1)
            batch = batch._replace(
                extras={"further_tokens": further_tokens, "further_lengths": lengths[:, None].expand(shape)}
            )
        out = forward_pass(self.net, batch, needs) if needs else None
        mark("network")
        if out is not None and self.weights["caption"] and out.hidden is not None:
            terms.append(caption_term(out))
        mark("caption")
        if out is not None and self.weights["contrastive"]:
            terms += loss_terms(out._replace(hidden=None)).values()
        mark("contrastive")
        for objective in self.shared:
            terms += objective(self.net, objective.example(batch), out).values()
        del out
        for objective in self.own:
            several = batch._replace(images=given[: len(tokens) * objective.images])
            terms += objective(self.net, objective.example(several)).values()
        mark("objectives")
        return torch.stack(terms).sum()


def _inputs(step: _Step, caption_tokens: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fake images, as many as a sample has at most, real tokens and lengths.

    The parameters and buffers of the step are replaced by fake tensors on the CPU, which has all operators, with
    gradients.
    """
    count = batch * max((objective.images for objective in step.own), default=1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in step.train().modules():
            for name, p in module._parameters.items():
                if p is not None:
                    fake = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                    fake.grad = torch.empty_like(fake) if p.requires_grad else None
                    module._parameters[name] = fake
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
        shape = (count, *step.reader.leading, 3, *largest_shape(step.net.preprocessing))
        images = torch.empty(shape, dtype=torch.uint8)
    return images, torch.zeros(batch, caption_tokens, dtype=torch.long), torch.full((batch,), caption_tokens)


class _Recorder(TorchDispatchMode):
    """What a device would be given, and the most bytes that tensors made inside the block occupied at once.

    Views and empty tensors are made by the host alone. Adding to the gradients of an earlier step does
    not count: they exist beforehand only to be no part of the peak.
    """

    def __init__(self, given: Iterable[Tensor], grads: Iterable[Tensor]) -> None:
        super().__init__()
        self.operations = self.now = self.peak = 0
        self.collects = False  # in the backward pass: recomputation leaves cycles, which Python collects at some time
        self._grads = {id(grad): grad for grad in grads}
        # Kept alive: their addresses must not be reused.
        self._given = [t.untyped_storage() for t in (*given, *self._grads.values())]
        self._known = {storage._cdata for storage in self._given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # a fake tensor is asked several times in each operation
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        adds_gradients = packet is torch.ops.aten.add_ and id(args[0]) in self._grads
        self.operations += not (func.is_view or "empty" in packet.__name__ or adds_gradients)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self._known:
                    continue
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                if self.now > self.peak:
                    if self.collects:
                        gc.collect()
                    self.peak = max(self.peak, self.now)
                finalize(storage, self._release, storage._cdata, storage.nbytes())
        return out

    def _release(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


# FLOPs, from shapes, of operators that PyTorch's counter lacks or gets wrong.
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    # Four products. A fused kernel also recomputes the scores, which is not counted as work of the model.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda _, query, key, value, *__, **___: 2 * sdpa_flop_count(query, key, value)
    ),
    # PyTorch's formula ignores groups. The last argument says which gradients are needed: input, weight, bias.
    torch.ops.aten.convolution_backward: (
        lambda gradient, _, weight, *others, **__: sum(others[-1][:2]) * 2 * gradient.numel() * weight[1:].numel()
    ),
    torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left.numel() * right[1],
}

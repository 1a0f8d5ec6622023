"""One training step of the real network and losses on tensors without storage: every operator runs, none computes.

Weights, images and everything computed from them are fake (`FakeTensorMode`). Token ids, lengths and masks are real,
so that code which reads their values runs as in training. Frozen parts, loss weights, precision, recomputation and any
image encoder therefore count as they do in training. PyTorch's `FlopCounterMode` counts the FLOPs; memory is the most
that the step holds at once. All captions have the same, mean length: packed captions cost what their tokens cost.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from coca_lit.losses import loss_terms
from coca_lit.models import CoCa

BATCHES = (64, 128)  # the difference of two steps is the cost per sample; both exceed a chunk of the losses
PARTS = {  # part of the plan -> modules of the network
    "image encoder": ("image_encoder",),
    "pooling": ("pooling", "image_projection"),
    "text tower": ("text",),
    "decoder": ("decoder",),
}


class Step(NamedTuple):
    """The cost of a training step."""

    samples: int
    forward: dict[str, int]  # FLOPs by part; a multiply-add counts as 2
    total: int  # FLOPs of forward and backward pass, recomputation included
    peak: int  # bytes of activations and temporary tensors, without weights, gradients and inputs


class Cost(NamedTuple):
    """The cost of a training step, per sample."""

    forward: dict[str, float]  # FLOPs by part
    total: float  # FLOPs of forward and backward pass
    activations: float  # bytes
    fixed: float  # bytes at any batch size: casts of weights, chunks of the losses


def cost(net: CoCa, weights: Mapping[str, float], caption_tokens: int, autocast: torch.dtype | None) -> Cost:
    """The cost of a sample in a large batch.

    Args:
        net: on the meta device; its parameters are replaced.
        weights: of the losses "contrastive" and "caption"; a loss of weight 0 is skipped.
        caption_tokens: mean length of the captions, start and end included.
        autocast: type of mixed precision; None computes in the type of the weights.
    """
    few, many = (trace(net, weights, caption_tokens, autocast, batch) for batch in BATCHES)
    slope = (many.peak - few.peak) / (many.samples - few.samples)
    forward = {part: flops / many.samples for part, flops in many.forward.items()}
    return Cost(forward, many.total / many.samples, slope, max(few.peak - few.samples * slope, 0.0))


def trace(
    net: CoCa, weights: Mapping[str, float], caption_tokens: int, autocast: torch.dtype | None, batch: int
) -> Step:
    """A step with `batch` samples; arguments as for `cost`."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        _to_fake(net.train())
        images = torch.empty(batch, 3, net.image_size, net.image_size, dtype=torch.uint8)
    tokens = torch.zeros(batch, caption_tokens, dtype=torch.long)
    lengths = torch.full((batch,), caption_tokens)
    asked = {"contrastive": bool(weights["contrastive"]), "captioning": bool(weights["caption"])}
    given = [images, tokens, lengths, *net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())]
    memory = _PeakMemory(t for t in given if t is not None)
    with memory, FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = net(images, tokens, lengths, **asked)
            by_module = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
            terms, before = [], counter.get_total_flops()
            if out.hidden is not None:
                terms.append(loss_terms(out._replace(image_features=None))["caption"])
            vocabulary, before = counter.get_total_flops() - before, counter.get_total_flops()
            if out.image_features is not None:
                terms.append(loss_terms(out._replace(hidden=None))["contrastive"])
            logits = counter.get_total_flops() - before  # they grow with the global batch: see `estimate.flops`
            loss = torch.stack(terms).sum()
            del out, terms
        loss.backward()
        del loss
    root = type(net).__name__
    forward = {
        part: sum(by_module.get(f"{root}.{name}", 0) for name in names)
        for part, names in PARTS.items()
        if part != "decoder" or vocabulary
    }
    forward |= {"vocabulary, with its gradients": vocabulary} if vocabulary else {}
    return Step(batch, forward, counter.get_total_flops() - logits, memory.peak)


def _to_fake(net: nn.Module) -> None:
    """Replaces parameters and buffers by fake tensors on the CPU, which has all operators, and allocates gradients."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                fake.grad = torch.empty_like(fake) if p.requires_grad else None
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


class _PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside the block occupied at once."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._given = [t.untyped_storage() for t in given]  # kept alive: their addresses must not be reused
        self._known = {storage._cdata for storage in self._given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:  # a mask is real here; a fake copy of it would have no values to count
            real = [i.nonzero().unbind(1) if i is not None and i.dtype is torch.bool else [i] for i in args[1]]
            args = (args[0], [index for part in real for index in part])
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Four products. A fused kernel also recomputes the scores, which is not counted as work of the model."""
    return 2 * sdpa_flop_count(query, key, value)


def _convolution_backward(gradient: torch.Size, _: Any, weight: torch.Size, *others: Any, **__: Any) -> int:
    """PyTorch's formula ignores groups. The last argument says which gradients are needed: input, weight, bias."""
    return sum(others[-1][:2]) * 2 * gradient.numel() * weight[1:].numel()


def _addmm(_: Any, left: torch.Size, right: torch.Size, **__: Any) -> int:
    return 2 * left.numel() * right[1]


# FLOPs, from shapes, of operators that PyTorch's counter lacks or gets wrong.
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten.addmm_: _addmm,
}

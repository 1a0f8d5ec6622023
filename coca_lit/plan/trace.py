"""One training step on tensors without storage: every operator runs, none computes.

The real network and the real losses run under PyTorch's `FakeTensorMode`, so frozen parts, loss weights, precision,
recomputation and any image encoder count as they would in training. FLOPs come from the formulas of PyTorch's counter,
memory is what the step holds at its peak. Captions have one length, the mean: packed captions cost what their tokens
cost.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import addmm_flop, flop_registry, sdpa_flop_count

from coca_lit.losses import caption_loss, contrastive_term
from coca_lit.models import CoCa
from coca_lit.models.packing import Layout

BATCHES = (64, 128)  # of the two steps whose difference is the memory per sample; larger than a chunk of the losses


class Step(NamedTuple):
    """A training step of some samples."""

    samples: int
    forward: dict[str, int]  # FLOPs by part, 2 for a multiplication with addition
    total: int  # FLOPs with the backward pass and what that computes again
    peak: int  # bytes of activations and temporary tensors, beside weights, gradients and inputs


class Cost(NamedTuple):
    """A training step, per sample."""

    forward: dict[str, float]  # FLOPs by part
    total: float  # FLOPs with the backward pass
    activations: float  # bytes
    fixed: float  # bytes whatever the batch: casts of weights, chunks of the losses


def cost(net: CoCa, weights: Mapping[str, float], caption_tokens: int, autocast: torch.dtype | None) -> Cost:
    """What a sample costs in a large batch.

    Args:
        net: on the meta device; its parameters are replaced.
        weights: of "contrastive" and "caption", 0 for a loss that is skipped.
        caption_tokens: mean length of the captions, start and end included.
        autocast: the type of mixed precision, None for that of the weights.
    """
    few, many = (trace(net, weights, caption_tokens, autocast, batch) for batch in BATCHES)
    slope = (many.peak - few.peak) / (many.samples - few.samples)
    forward = {part: flops / many.samples for part, flops in many.forward.items()}
    return Cost(forward, many.total / many.samples, slope, max(few.peak - few.samples * slope, 0.0))


def trace(
    net: CoCa, weights: Mapping[str, float], caption_tokens: int, autocast: torch.dtype | None, batch: int
) -> Step:
    """One step of `batch` samples; arguments as for `cost`."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_storage(net)
        net.train()
        for p in net.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        size = (batch, 3, net.image_size, net.image_size)
        images = torch.empty(size, dtype=torch.uint8)
        tokens = torch.zeros(batch, caption_tokens, dtype=torch.long)
        given = [images, tokens, *net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())]
        with _Meter(t for t in given if t is not None) as meter:
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss, forward = _loss(net, weights, images, tokens, meter)
            loss.backward()
            del loss
        return Step(batch, forward, meter.flops, meter.peak)


def _loss(
    net: CoCa, weights: Mapping[str, float], images: Tensor, tokens: Tensor, meter: "_Meter"
) -> tuple[Tensor, dict[str, int]]:
    """As `CoCa.forward` and the losses, for captions (B, T) of one length: no shape may depend on a value here."""
    contrastive, decoder = bool(weights["contrastive"]), net.decoder if weights["caption"] else None
    batch, length = tokens.shape
    lengths = torch.full((batch,), length)
    marks = {"": 0}
    encoded = net.image_encoder(images)
    marks["image encoder"] = meter.flops
    vector, image_tokens = net.pooling(encoded, contrastive, decoder is not None)
    image_features = net.image_projection(vector) if contrastive else None
    marks["pooling"] = meter.flops
    pad = net.text.cls_mask == "legacy" and length < net.text.context_length
    states, text_features, _ = net.text(
        tokens, lengths, contrastive, packed=False, max_length=length + pad + contrastive
    )
    marks["text tower"] = meter.flops
    terms = []
    if decoder is not None:
        layout = Layout(lengths - 1, packed=False, max_length=length - 1)
        hidden = decoder(states[:, : length - 1], image_tokens, layout).flatten(0, 1)  # (B·(T - 1), D)
        marks["decoder"] = meter.flops
        terms.append(caption_loss(hidden, decoder.vocabulary.weight, tokens[:, 1:].flatten()))
        marks["vocabulary, with its gradients"] = meter.flops
    if image_features is not None and text_features is not None:
        features = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
        apart = meter.flops  # they grow with the global batch, see `estimate`
        terms.append(contrastive_term(*features, net.logit_scale.exp(), net.logit_bias))
        meter.flops = apart
    ends = list(marks.values())
    return torch.stack(terms).sum(), {
        part: end - begin for part, begin, end in zip(list(marks)[1:], ends, ends[1:], strict=False)
    }


def _without_storage(net: nn.Module) -> None:
    """Moves parameters and buffers from the meta device to fake tensors of the CPU, which has the real operators."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


class _Meter(TorchDispatchMode):
    """Counts FLOPs, and the most bytes that tensors made inside the block occupied at once."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._given = [t.untyped_storage() for t in given]  # kept: their addresses must not be used again
        self._known = {storage._cdata for storage in self._given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if (formula := _FORMULAS.get(packet)) is not None:
            self.flops += formula(*args)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
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
        finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> int:
    """Four products. A fused kernel computes the scores once more, which is no work of the model."""
    return 2 * sdpa_flop_count(query.shape, key.shape, value.shape)


def _convolution_backward(gradient: Tensor, _: Tensor, weight: Tensor, *others: Any) -> int:
    """PyTorch's formula takes no notice of groups."""
    return sum(others[-1][:2]) * 2 * gradient.numel() * (weight.numel() // len(weight))


# What PyTorch's counter lacks or gets wrong.
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten.addmm_: lambda _, a, b: addmm_flop(None, a.shape, b.shape),
}

"""A training step on a simulated GPU: it equals the step on the CPU, and the host never waits for the device."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated_gpu import DeviceTensor, counted, on_cpu, to_gpu
from torch import Tensor

from coca_lit import extensions
from coca_lit.data.batch import Batch
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, create_model
from coca_lit.models.coca import CAPTION, CONTRASTIVE
from coca_lit.models.packing import to_device
from coca_lit.models.presets import PRESETS, preset
from coca_lit.tools.plan.trace import trace
from coca_lit.training.caption_objectives import PrefixPrompts
from coca_lit.training.gradient_caching import cached_loss
from coca_lit.training.objectives import Captions, Contrastive

LENGTHS = [5, 9, 17, 6, 7, 12, 24, 4]  # of captions; more than a tenth of the grid would be padding
VIT = {"image_encoder": "vit_tiny_patch16_224", "image_encoder_args": {"depth": 1, "embed_dim": 32, "num_heads": 2}}
SMALL: dict[str, Any] = {"text_layers": 1, "decoder_layers": 1, "pooler_queries": 5, **VIT}


def make_batch(net: CoCa, lengths: list[int] = LENGTHS) -> Batch:
    generator = torch.Generator().manual_seed(0)
    size, count = net.image_size, len(lengths)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(4, 40, (count, max(lengths)), generator=generator)
    tokens[torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]] = 0
    return Batch(images, tokens, torch.tensor(lengths), [str(i) for i in range(count)])


def on_gpu(batch: Batch) -> Batch:
    """As a loader with pinned memory and Lightning hand it over."""
    pinned = batch._replace(images=batch.images.pin_memory(), tokens=batch.tokens.pin_memory())
    return pinned.to(torch.device("cuda", 0))


def pair(**overrides: Any) -> tuple[CoCa, CoCa]:
    """The same network on the CPU and on the GPU."""
    torch.manual_seed(0)
    net = create_model("coca_tiny", **{**SMALL, **overrides}).train()
    return net, to_gpu(copy.deepcopy(net))


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, by the size of the largest number."""
    found, expected = on_cpu(found).float(), on_cpu(expected).float()
    return ((found - expected).abs().max() / (expected.abs().max() + 1e-9)).item() if expected.numel() else 0.0


Step = Callable[[CoCa, Batch], Tensor]


def plain_step(net: CoCa, batch: Batch, smoothing: float = 0.0, **asked: Any) -> Tensor:
    out = net(batch.images, batch.tokens, batch.lengths, prefix_lengths=batch.prefix_lengths, **asked)
    return torch.stack(list(loss_terms(out, smoothing).values())).sum()


IN_TIMM = "models/variants/naflex.py"  # which calls timm: it copies the places of each shape in a batch to the device


def compare(nets: tuple[CoCa, CoCa], batch: Batch, step: Step, kind: torch.dtype | None = None) -> Any:
    """Checks loss and gradients, and that nothing waits; returns what was counted."""
    (cpu, gpu), tolerance = nets, 1e-4 if kind is None else 0.1
    with torch.autocast("cpu", kind or torch.bfloat16, enabled=kind is not None):
        expected = step(cpu, batch)
    expected.backward()
    with counted() as recorder:
        with torch.autocast("cuda", kind or torch.bfloat16, enabled=kind is not None):
            found = step(gpu, on_gpu(batch))
        found.backward()
    assert isinstance(found, DeviceTensor)
    waits = {what: times for what, times in recorder.waits.items() if what[1].partition(":")[0] != IN_TIMM}
    assert not waits, waits
    assert distance(found, expected) < tolerance / 5
    grads = [(p.grad, q.grad) for p, q in zip(gpu.parameters(), cpu.parameters(), strict=True)]
    assert [p is None for p, _ in grads] == [q is None for _, q in grads]
    largest = max(q.abs().max().item() for _, q in grads if q is not None)
    for p, q in grads:
        if q is not None:
            assert (on_cpu(p).float() - q.float()).abs().max().item() < tolerance * max(largest, 1e-3)
    return recorder


CASES: dict[str, dict[str, Any]] = {
    "single": {"pooler": "single"},
    "parallel": {"pooler": "parallel"},
    "cascade": {"pooler": "cascade"},
    "legacy": {"cls_mask": "legacy"},
    "sigmoid": {"contrastive": "siglip"},
    "tied": {"tied_embeddings": True},
    "resnet": {"image_encoder": "resnet10t", "image_encoder_args": {}},
}


@pytest.mark.parametrize("kind", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_the_cpu_and_never_waits(case: str, kind: torch.dtype | None) -> None:
    if kind is torch.float16 and case not in ("single", "legacy"):
        pytest.skip("the CPU emulates fp16 slowly")
    nets = pair(**CASES[case])
    if "net" in case:
        for net in nets:
            net.image_encoder.eval()  # batch norms of eight images are no comparison
    recorder = compare(nets, make_batch(nets[0]), plain_step, kind)
    if kind is not None and case == "single":
        assert {kernel for kernel, *_ in recorder.attention} == {"flash", "varlen"}


def smoothed(net: CoCa, batch: Batch) -> Tensor:
    return plain_step(net, batch, smoothing=0.1)


def alone(net: CoCa, batch: Batch) -> Tensor:
    return loss_terms(net.captions_of(None, batch.tokens, batch.lengths))["caption"]


def contrastive_only(net: CoCa, batch: Batch) -> Tensor:
    return plain_step(net, batch, needs=CONTRASTIVE)


def caption_only(net: CoCa, batch: Batch) -> Tensor:
    return plain_step(net, batch, needs=CAPTION)


def questions(net: CoCa, batch: Batch) -> Tensor:
    return plain_step(net, batch._replace(prefix_lengths=torch.tensor([1, 2, 3, 1, 1, 2, 4, 1])))


def in_micro_batches(net: CoCa, batch: Batch) -> Tensor:
    return cached_loss(net, [Contrastive(1.0), Captions(2.0)], batch, 4)[0]


def behind_prompts(net: CoCa, batch: Batch) -> Tensor:
    objective = PrefixPrompts(["we see", "the small picture of"])
    objective.build(net)
    objective.ids = to_device(objective.ids, net.device)  # as Lightning does before the first step
    torch.manual_seed(0)
    return objective(net, batch)["prefixed"]


@pytest.mark.parametrize(
    "step",
    [smoothed, alone, contrastive_only, caption_only, questions, in_micro_batches, behind_prompts],
    ids=lambda step: step.__name__,
)
def test_every_kind_of_step(step: Step) -> None:
    nets = pair()
    compare(nets, make_batch(nets[0]), step)


def test_a_device_without_the_kernel_for_packed_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coca_lit.models.kernels.fast_attention._is_available", lambda device: False)
    nets = pair()
    recorder = compare(nets, make_batch(nets[0]), plain_step, torch.bfloat16)
    assert {kernel for kernel, *_ in recorder.attention} == {"flash"}


@pytest.mark.parametrize("recomputed", ["cross_attention", "blocks"])
def test_recomputation(recomputed: Any) -> None:
    nets = pair()
    for net in nets:
        net.set_grad_checkpointing(recomputed)
    compare(nets, make_batch(nets[0]), plain_step, torch.bfloat16)


@pytest.mark.parametrize("kind", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_plan_counts_these_operations(kind: torch.dtype | None) -> None:
    """Packing is what the plan, with texts of one length, does not see: of fp32, grids too, in each attention."""
    net = create_model("coca_tiny").train()
    with torch.device("meta"):
        shape = create_model("coca_tiny")
    planned = trace(shape, {"contrastive": 1.0, "caption": 1.0}, 12, kind, len(LENGTHS))
    recorder = compare((net, to_gpu(copy.deepcopy(net))), make_batch(net), plain_step, kind)
    assert planned.operations == pytest.approx(recorder.launches.total(), rel=0.05 if kind else 0.15)


@pytest.mark.parametrize("lengths", [[24, 23], [1, 2, 1]], ids=str)
def test_texts_that_need_no_packing_and_texts_without_words(lengths: list[int]) -> None:
    nets = pair(cls_mask="legacy")
    compare(nets, make_batch(nets[0], lengths), plain_step)


def test_words_that_the_vocabulary_lacks() -> None:
    nets = pair(tokenizer=["a", "dog", "cat", "in", "the"])
    batch = make_batch(nets[0])
    compare(nets, batch._replace(tokens=batch.tokens % 7), plain_step)


def parts(name: str) -> str:
    """What a preset is made of, whatever its sizes."""
    arguments = preset(name)
    encoder = arguments["image_encoder"].partition("_")[0]
    others = ("pooler", "text_tower", "text_tower_args", "decoder_args", "cls_mask", "tokenizer")
    return str([encoder, *(arguments.get(key) for key in others), arguments.get("decoder_layers") == 0])


# Made small, presets of the same parts are the same network.
SHAPES = [*{parts(name): name for name in reversed([*PRESETS, *extensions.declared("presets")])}.values()]


@pytest.mark.parametrize("name", SHAPES)
def test_every_preset_in_small(name: str) -> None:
    """With its pooler, mask, heads and kind of encoder, but one layer of each tower."""
    sizes: dict[str, Any] = {"text_layers": 1, "text_width": 64, "text_heads": 2, "embed_dim": 64, "image_size": 32}
    arguments = preset(name)
    if arguments.get("decoder_layers", 12):
        sizes |= {"decoder_layers": 1, "pooler_queries": 5, "pooler_heads": 2}
    if "vit" in str(arguments.get("image_encoder", "vit")):
        sizes |= {"image_encoder_args": {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 16}}
    torch.manual_seed(0)
    net = create_model(name, **sizes).train()
    gpu = to_gpu(copy.deepcopy(net))
    for part in (net, gpu):
        part.image_encoder.eval()
    compare((net, gpu), make_batch(net, [5, 9, 12, 4]), plain_step, torch.bfloat16)

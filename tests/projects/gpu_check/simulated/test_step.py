"""A training step on a simulated GPU: it equals the step on the CPU, and the host never waits for the device."""

import copy
from typing import Any

import pytest
import torch
from compared_steps import LENGTHS, Step, compare, make_batch, pair
from simulated_gpu import to_gpu
from torch import Tensor

from coca_lit import extensions
from coca_lit.data.batch import Batch
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, create_model
from coca_lit.models.coca import CAPTION, CONTRASTIVE
from coca_lit.models.presets import PRESETS, preset
from coca_lit.tools.plan.trace import trace
from coca_lit.training.gradient_caching import cached_loss
from coca_lit.training.objectives import Captions, Contrastive


def plain_step(net: CoCa, batch: Batch, smoothing: float = 0.0, **asked: Any) -> Tensor:
    out = net(batch.images, batch.tokens, batch.lengths, prefix_lengths=batch.prefix_lengths, **asked)
    return torch.stack(list(loss_terms(out, smoothing).values())).sum()


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


@pytest.mark.parametrize(
    "step",
    [smoothed, alone, contrastive_only, caption_only, questions, in_micro_batches],
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

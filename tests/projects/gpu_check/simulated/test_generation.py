"""Captions on a simulated GPU: equal to the CPU's, with one look at the device in eight tokens."""

import copy
from typing import Any

import pytest
import torch
from simulated_gpu import counted, on_cpu, to_gpu
from subjects import images, small_net

from coca_lit.models import CoCa
from coca_lit.models.generation.state import LOOK_EVERY, Decoding

LENGTH = 20
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "prompt": {"prompt": "a red"},
    "prompts": {"prompt": ["a", "a red circle", "two", "a blue square and"]},
    "beam": {"strategy": "beam", "num_beams": 3},
    "legacy beam": {"strategy": "beam", "num_beams": 2, "scoring": "openclip_legacy"},
    "constrained": {"no_repeat_ngram": 2, "repetition_penalty": 1.2, "min_length": 6},
    "reranked": {"strategy": "beam", "num_beams": 4, "num_captions": 2, "rerank": "contrastive"},
}


@pytest.fixture(scope="module")
def nets() -> tuple[CoCa, CoCa]:
    net = small_net()
    return net, to_gpu(copy.deepcopy(net))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_captions_are_those_of_the_cpu(nets: tuple[CoCa, CoCa], strategy: str) -> None:
    options = STRATEGIES[strategy] | {"max_length": LENGTH}
    expected = nets[0].generate(images(), **options)
    with counted():
        found = nets[1].generate(images().pin_memory().to("cuda", non_blocking=True), **options)
    assert torch.equal(on_cpu(found), expected)


@pytest.mark.parametrize("strategy", ["greedy", "beam", "sample"])
def test_the_host_looks_once_in_eight_tokens(nets: tuple[CoCa, CoCa], strategy: str) -> None:
    for length in (LOOK_EVERY, 2 * LOOK_EVERY, 3 * LOOK_EVERY - 1):
        with counted() as recorder:
            pixels = images().pin_memory().to("cuda", non_blocking=True)
            nets[1].generate(pixels, strategy=strategy, min_length=length - 1, max_length=length)
        assert recorder.waits.total() == (length - 1) // LOOK_EVERY, recorder.waits


@pytest.mark.parametrize("strategy", ["greedy", "beam", "sample"])
def test_captions_that_end_leave_the_batch_at_a_look(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of the end are five times as large: for some images it is likely."""
    net = small_net()
    with torch.no_grad():
        net.decoder.vocabulary.weight[net.tokenizer.eot_id] *= 5
    left: list[bool] = []
    select = Decoding.select

    def selected(self: Decoding, rows: torch.Tensor, images: torch.Tensor | None = None) -> None:
        left.append(images is not None)
        select(self, rows, images)

    monkeypatch.setattr(Decoding, "select", selected)
    gpu = to_gpu(copy.deepcopy(net))
    with counted() as recorder:
        pixels = images(32).pin_memory().to("cuda", non_blocking=True)
        found = gpu.generate(pixels, strategy=strategy, max_length=LENGTH)
    assert any(left)
    assert recorder.waits.total() <= LENGTH // LOOK_EVERY, recorder.waits
    if strategy != "sample":
        assert torch.equal(on_cpu(found), net.generate(images(32), strategy=strategy, max_length=LENGTH))

"""Captions on a simulated GPU: equal to the CPU's, with one look at the device in eight tokens."""

import copy
from typing import Any

import pytest
import torch
from simulated_gpu import counted, on_cpu, to_gpu

from coca_lit.models import CoCa, create_model
from coca_lit.models.generation.state import LOOK_EVERY, static_step

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
    torch.manual_seed(0)
    vit = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    net = create_model("coca_tiny", image_encoder="vit_tiny_patch16_224", image_encoder_args=vit).eval()
    return net, to_gpu(copy.deepcopy(net))


def images() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_captions_are_those_of_the_cpu(nets: tuple[CoCa, CoCa], strategy: str) -> None:
    options = STRATEGIES[strategy] | {"max_length": LENGTH}
    expected = nets[0].generate(images(), **options)
    with counted():
        found = nets[1].generate(images().pin_memory().to("cuda", non_blocking=True), **options)
    assert torch.equal(on_cpu(found), expected)


@pytest.mark.parametrize("strategy", ["greedy", "beam", "sample"])
def test_the_host_looks_once_in_eight_tokens(nets: tuple[CoCa, CoCa], strategy: str) -> None:
    waits = []
    for length in (LOOK_EVERY, 2 * LOOK_EVERY, 3 * LOOK_EVERY - 1):  # of captions that do not end before
        with counted() as recorder:
            pixels = images().pin_memory().to("cuda", non_blocking=True)
            nets[1].generate(pixels, strategy=strategy, min_length=length - 1, max_length=length)
        waits.append(recorder.waits.total())
    few, more, most = waits
    assert more - few <= 4  # whether all have ended, whether any has, and whether rows change places
    assert most - more <= 4


def test_static_buffers_stay_where_they_are(nets: tuple[CoCa, CoCa], monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = []

    def step(text: Any, decoder: Any, tokens: Any, position: Any, images: Any, storage: Any) -> Any:
        addresses.append([x.data_ptr() for x in (*storage, *(x for pair in images for x in pair))])
        return static_step(text, decoder, tokens, position, images, storage)

    monkeypatch.setattr(nets[0], "static_step", step)
    for _ in range(2):
        nets[0].generate(images(), max_length=6, min_length=5)
    assert len(addresses) > 4
    assert all(found == addresses[0] for found in addresses)

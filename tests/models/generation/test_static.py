"""The static step of a GPU, compiled on a CPU, against the captions of the ordinary path."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from coca_lit.models import CoCa
from coca_lit.models.generation.static import CompiledGenerator, static_step
from helpers.generating import LENGTH, PROMPTS, make_images, make_model
from helpers.slow import slow

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"strategy": "beam", "num_beams": 3, "num_captions": 3},
    "legacy": {"strategy": "beam", "num_beams": 2, "scoring": "openclip_legacy"},
    "sample": {"strategy": "sample", "num_captions": 3},
}


@pytest.fixture(scope="module")
def model() -> CoCa:
    return make_model()


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("count", [*slow(0), 5])
@pytest.mark.parametrize("rules", [*slow({}), {"min_length": 6, "no_repeat_ngram": 2}], ids=["free", "constrained"])
def test_captions_are_those_of_the_ordinary_path(
    model: CoCa, options: dict[str, Any], prompt: str, count: int, rules: dict[str, Any]
) -> None:
    def write(writer: Any) -> Any:
        drawn = {"generator": torch.Generator().manual_seed(0)} if options.get("strategy") == "sample" else {}
        common = options | drawn | rules | {"prompt": PROMPTS[prompt](count), "max_length": LENGTH}
        return writer.generate(make_images(count), return_scores=True, **common)

    static = CompiledGenerator(model)
    static.step = static_step
    expected, found = write(model), write(static)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_one_graph_serves_all_steps_and_batches_of_a_size() -> None:
    model, images = make_model(), make_images(8)
    expected = model.generate(images, max_length=12)
    assert len({row.index(model.tokenizer.eot_id) for row in expected.tolist()}) > 2  # rows leave the ordinary path
    torch._dynamo.reset()
    counters.clear()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = CompiledGenerator(model, backend=backend)
    assert torch.equal(compiled.generate(images, max_length=12), expected)
    assert torch.equal(compiled.generate(images.flip(0), max_length=12), expected.flip(0))
    assert backend.frame_count == 1
    assert not counters["graph_break"]

"""The planner against the FLOP counter in a step of a classifier."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coca_lit.data.batch import Batch
from coca_lit.models import CoCa, create_model
from coca_lit.projects.reasoning.classifiers import StateClassifier
from coca_lit.tools.plan.estimate import measure
from coca_lit.tools.plan.trace import trace

WEIGHTS = {"contrastive": 1.0, "caption": 2.0}
BATCH, TOKENS = 8, 12


def planned_net() -> CoCa:
    with torch.device("meta"):
        return create_model("coca_tiny")


def classifier_of(net: CoCa) -> StateClassifier:
    classifier = StateClassifier(["no", "yes", "perhaps"], images=2)
    classifier.build(net)
    return classifier


@pytest.mark.slow
@pytest.mark.parametrize("weights", [{"contrastive": 0.0, "caption": 0.0}, WEIGHTS], ids=["alone", "and pairs"])
def test_a_classifier_beside_the_network_is_counted(weights: dict[str, float]) -> None:
    """Two images of each sample, against the counter in a real step."""
    real, planned = create_model("coca_tiny").train(), planned_net()
    beside = classifier_of(real)
    with torch.device("meta"):
        counted = classifier_of(planned)
    tokens, lengths = torch.randint(3, 30, (BATCH, TOKENS)), torch.full((BATCH,), TOKENS)
    images = torch.zeros(2 * BATCH, 3, 32, 32, dtype=torch.uint8)
    batch = Batch(images, tokens, lengths, [], prefix_lengths=lengths, extras={"captions": [("yes",)] * BATCH})
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        beside(real, batch)["labels"].backward()
    without = trace(planned_net(), weights, TOKENS, None, BATCH).total if any(weights.values()) else 0
    step = trace(planned, weights, TOKENS, None, BATCH, [counted])
    assert step.total - without == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert all(step.forward[part] > 0 for part in ("image encoder", "pooling", "text tower", "decoder"))
    assert step.forward["objectives"] == 2 * BATCH * 2 * real.config.text_width * 3
    head = sum(p.numel() for p in beside.parameters())
    assert measure(real, [beside]).weights == measure(real).weights + 4 * head

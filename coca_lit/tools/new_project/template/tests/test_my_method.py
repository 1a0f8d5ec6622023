"""The loss, against a loop over pairs."""

import pytest
import torch
from my_method.objective import Nearness

from coca_lit.data.batch import Batch, padded
from coca_lit.models import create_model

CAPTIONS = ["a large red circle", "a small blue square below a green ring", "the pink star"]


@torch.no_grad()
def test_the_loss_equals_a_loop_over_pairs() -> None:
    torch.manual_seed(0)
    net = create_model("coca_tiny").eval()
    tokens, lengths = padded(net.tokenizer.encode_batch(CAPTIONS), net.tokenizer.pad_id)
    images = torch.randint(0, 256, (len(CAPTIONS), 3, 32, 32), dtype=torch.uint8)
    batch = Batch(images, tokens, lengths, CAPTIONS)
    objective = Nearness()
    objective.build(net)
    out = net(images, tokens, lengths, needs=objective.needs)
    total = 0.0
    for image, text in zip(net.encode_image(images), net.encode_text(tokens), strict=True):
        total += 1 - float(image @ text)
    assert objective(net, batch, out)["nearness"].item() == pytest.approx(total / len(CAPTIONS), rel=1e-5)

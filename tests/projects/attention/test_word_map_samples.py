"""Pictures of where words come from."""

import numpy as np
import torch
from PIL import Image

from coca_lit.data.scenes.render import scene_records
from coca_lit.projects.attention.samples import overlay, word_map_samples


def test_overlay_is_bright_where_it_looked() -> None:
    attention = torch.zeros(4, 4)
    attention[0, 3] = 1
    drawn = np.asarray(overlay(Image.new("RGB", (32, 32), (90, 90, 90)), attention).convert("L"), dtype=float)
    quarter = len(drawn) // 4
    corner = drawn[:quarter, -quarter:].mean()
    assert corner > drawn[-quarter:, :quarter].mean() + 50


def test_captions_that_are_drawn_are_the_same_each_time(tiny_model) -> None:
    model, records = tiny_model(), scene_records("val", count=2)
    first, again = (word_map_samples(model, records, 2, {"strategy": "sample"}) for _ in range(2))
    assert [sample["caption"] for sample in first] == [sample["caption"] for sample in again]
    for sample in first:
        assert [part["word"] for part in sample["words"]] == sample["caption"].split()

"""Clips where images are cached, classified and compared; moving scenes against where a shape has to be."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coca_lit.cli.module import build_module
from coca_lit.data.batch import Batch
from coca_lit.data.datamodule import RecordsDataModule
from coca_lit.data.records import Record
from coca_lit.data.scenes.render import COLOURS
from coca_lit.errors import ConfigError, DataError
from coca_lit.evals import FunctionEvaluation, Settings
from coca_lit.models import create_model
from coca_lit.models.inputs import stack_images
from coca_lit.projects.classification.classifier import PoolerClassifier
from coca_lit.projects.video.clips import Clip
from coca_lit.projects.video.inputs import Clips
from coca_lit.projects.video.scenes import (
    COUNTS,
    Motion,
    MotionClip,
    motion_choice_records,
    motion_records,
)
from coca_lit.tools.report.comparable import obstacle
from coca_lit.weights.load import save_model
from helpers.running import compose

VIT = {
    "image_encoder": "vit_base_patch32_clip_224",
    "image_encoder_args": {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 1},
    "embed_dim": 32,
}


class Still(Clip):
    count = 2

    def frames(self, count: int | None = None) -> Iterator[Image.Image]:
        return iter([Image.new("RGB", (40, 40))] * (count or self.count))


@pytest.mark.parametrize(
    ("sizes", "frozen"),
    [
        ({"frame_pooling": "mean"}, "image_encoder"),
        ({"pooler": "means_of_tokens", **VIT}, "image_encoder"),
        ({}, "image_encoder.trunk.*1"),
    ],
    ids=["means", "class tokens", "stages"],
)
def test_features_of_clips_that_would_not_be_those_of_their_frames_are_refused(
    sizes: dict[str, Any], frozen: str, tmp_path: Path
) -> None:
    net = create_model("coca_tiny", imports=["helpers.means_of_tokens"], **sizes)
    net.freeze(frozen)
    clips = {"train": [Record(i, Still(), ("a red circle",)) for i in range(2)]}
    sizes = {"batch_size": 2, "image_size": 32, "val_split": None}
    data = RecordsDataModule(clips, tokenizer=net.tokenizer, cached_augmentations=1, cache_dir=str(tmp_path), **sizes)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    plugin = SimpleNamespace(forward_context=nullcontext, precision="32")
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(net=net), precision_plugin=plugin, strategy=strategy
    )
    with pytest.raises(DataError, match="features of clips are cached for"):
        data.setup("fit")


def test_scores_of_other_frames_cannot_be_compared(tmp_path: Path) -> None:
    found = []
    for frames, pooling in ((4, "tokens"), (4, "mean"), (8, "tokens"), (4, "tokens")):
        evaluation = FunctionEvaluation("x", motion_records("val", frames, 32, 2), lambda *_: {"mine": 1.0})
        evaluation.evaluate(create_model("coca_tiny", frame_pooling=pooling), Settings(tmp_path))
        found.append(evaluation.conditions["x/mine"])
    words = ["frame_pooling=tokens / frame_pooling=mean", "frames=4 / frames=8", ""]
    assert [obstacle(found[0], other) for other in found[1:]] == words


@pytest.mark.parametrize(
    ("words", "options"), [((), {"frame_pooling": "mean"}), (("+model.net.frame_pooling=tokens",), {})]
)
def test_frames_are_pooled_as_in_the_weights_unless_one_chooses(
    words: tuple[str, ...], options: dict[str, str], tmp_path: Path, tiny_model: Any
) -> None:
    save_model(tiny_model(frame_pooling="mean"), tmp_path / "m.safetensors")
    net = build_module(compose("data=scenes", f"init_from={tmp_path / 'm.safetensors'}", *words)).net
    assert net.config.options == net.pooling.options == options


def test_a_pooler_of_the_encoder_sees_all_frames_at_once() -> None:
    mean = create_model("coca_tiny", frame_pooling="mean")
    tokens = mean.tokenizer(["a red circle"] * 2)
    pixels = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    clips = Batch(Clips(pixels), tokens, (tokens > 0).sum(1), ["0", "1"], extras={"captions": [("a",), ("b",)]})
    for training in (True, False):
        classifier = PoolerClassifier(["a", "b"], heads=2, mixup=0.4)
        classifier.build(mean)
        with pytest.raises(ConfigError, match="frame_pooling=tokens"):
            classifier.train(training)(mean, clips)


def test_a_batch_is_of_one_kind_and_one_number_of_frames() -> None:
    clip, image = Clips(torch.zeros(2, 3, 8, 8)), torch.zeros(3, 8, 8)
    assert stack_images([clip, clip]).rows.shape == (2, 2, 3, 8, 8)
    with pytest.raises(DataError, match="several kinds"):
        stack_images([clip, image])
    with pytest.raises(DataError, match="several numbers of frames"):
        stack_images([clip, Clips(torch.zeros(3, 3, 8, 8))])


# Moving scenes


RED, BLUE = ("red", "circle"), ("blue", "square")


def places(motion: Motion, colour: str, frames: int = 8) -> list[float]:
    """Where the pixels of a colour are from left to right, on average; NaN where there are none."""
    found = []
    for frame in MotionClip(motion, 3, frames, size=64).frames():
        near = np.abs(np.asarray(frame, int) - np.array(COLOURS[colour])).sum(axis=2) < 30
        found.append(near.nonzero()[1].mean() / 64 if near.any() else np.nan)
    return found


@pytest.mark.parametrize(
    ("event", "side", "begin", "end"),
    [
        ("moves", "right", 0.2, 0.8),
        ("moves", "left", 0.8, 0.2),
        ("passes", "right", 0.2, 0.8),
        ("passes", "left", 0.8, 0.2),
        ("enters", "left", None, 0.46),
        ("enters", "right", None, 0.54),
        ("leaves", "left", 0.46, None),
        ("leaves", "right", 0.54, None),
    ],
)
def test_what_happens(event: str, side: str, begin: float | None, end: float | None) -> None:
    motion = Motion(event, side, RED, BLUE)
    found = places(motion, "red")
    for place, expected in ((found[0], begin), (found[-1], end)):
        assert np.isnan(place) if expected is None else abs(place - expected) < 0.05
    seen = [place for place in found if not np.isnan(place)]
    to_right = (side == "right") == (event != "enters")
    assert seen == sorted(seen, reverse=not to_right)
    stays = places(motion, "blue")
    assert all(np.isnan(stays)) if event == "moves" else max(stays) - min(stays) < 1e-9


def test_each_clip_has_its_reverse() -> None:
    records = motion_records("test", frames=5)
    for first, second in zip(records[::2], records[1::2], strict=True):
        assert second.image.motion == first.image.motion.backwards()
        forwards, backwards = ([np.asarray(x) for x in record.image.frames()] for record in (first, second))
        np.testing.assert_array_equal(forwards, backwards[::-1])
        assert any((a != b).any() for a, b in zip(forwards, backwards, strict=True))
        np.testing.assert_array_equal(np.asarray(first.image()), np.asarray(second.image()))  # the middle one


def test_splits_share_no_text() -> None:
    texts = [record.captions[0] for split in COUNTS for record in motion_records(split, frames=1)]
    assert len(set(texts)) == len(texts) == sum(COUNTS.values())
    for split in ("trian", ""):
        with pytest.raises(ValueError, match="train, val, test"):
            motion_records(split, 1)
    with pytest.raises(ValueError, match="has 512 clips, got count=513"):
        motion_records("val", 1, count=513)


def test_choice_is_fair_without_the_clip() -> None:
    """In the two texts of "time" everything occurs equally often as right and as wrong one."""
    records = motion_choice_records("test", frames=1)
    kinds = Counter(record.domain for record in records)
    assert kinds["object"] == kinds["time"] == COUNTS["test"]
    assert kinds["side"] > 200 < kinds["mover"]
    right, wrong = (Counter(r.captions[i] for r in records if r.domain == "time") for i in (0, 1))
    assert right == wrong
    assert all(len(set(record.captions)) == 2 for record in records)

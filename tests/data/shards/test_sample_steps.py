"""Steps for samples of shards, as a project would declare them: what they make, and what they do not go with."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from coca_lit import extensions
from coca_lit.data.inputs import ImageReader
from coca_lit.data.shards.index import TarIndex
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.training import Sample, SampleStep
from coca_lit.data.sources import TrainTransform
from helpers.shards import TOKENIZER, write_shards

SIZE = 16


class PairReader(ImageReader):
    kind = "pair"

    def __init__(self, pairs: int) -> None:
        self.leading = (pairs,)


class Painted:
    """A step that paints the whole image in one shade, and tells what it was given."""

    def __init__(self, shade: int, size: int, shards: list[str]) -> None:
        self.shade = shade
        self.size = size
        self.shards = shards

    def __call__(self, sample: Sample, rng: random.Random) -> tuple[torch.Tensor, dict[str, Any]]:
        image = torch.full((3, self.size, self.size), self.shade, dtype=torch.uint8)
        extras = {
            "painted.shape": torch.tensor(sample.pixels.shape),
            "painted.caption": sample.caption,
            "painted.place": f"{sample.shard}/{sample.key}",
            "painted.shards": self.shards,
        }
        return image, extras


def painting(shade: int, transform: TrainTransform, indexes: Sequence[TarIndex]) -> SampleStep:
    return Painted(shade, transform.size, [Path(index.shard.name).name for index in indexes])


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = f"{__name__}:PairReader"
    step = extensions.DeclaredStep(f"{__name__}:painting", "in which images are painted")
    options = {"pairs": extensions.InputOption(reader, 0, "of pictures")}
    tables = {"inputs": {".pair": reader}}
    monkeypatch.setattr(extensions, "declared", lambda name: tables.get(name, {}))
    monkeypatch.setattr(extensions, "input_options", lambda: options)
    monkeypatch.setattr(extensions, "sample_steps", lambda: {"shade": step, "tint": step})


def laion(folder: Path, **further: Any) -> LAIONDataModule:
    return LAIONDataModule(
        str(folder / "*.tar"),
        None,
        tokenizer=TOKENIZER,
        batch_size=2,
        image_size=SIZE,
        cache_dir=str(folder / "cache"),
        **further,
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_step_makes_the_image_and_extras_of_each_sample(declared: None, tmp_path: Path, num_workers: int) -> None:
    paths = write_shards(tmp_path, 2, 2)
    batches = list(laion(tmp_path, shade=7, num_workers=num_workers).train_dataloader())
    assert len(batches) == 2
    for batch in batches:
        assert batch.images.shape == (2, 3, SIZE, SIZE)
        assert batch.images.unique().tolist() == [7]
        assert batch.extras["painted.shape"].tolist() == [[3, 18, 20]] * 2  # the whole image
        assert batch.extras["painted.caption"] == ["a dog number"] * 2
        assert batch.extras["painted.place"] == batch.keys
        assert batch.extras["painted.shards"] == [[path.name for path in paths]] * 2


@pytest.mark.parametrize("further", [{}, {"shade": None, "tint": None}])
def test_without_a_value_there_is_no_step(declared: None, tmp_path: Path, further: dict[str, None]) -> None:
    write_shards(tmp_path, 1, 2)
    (batch,) = laion(tmp_path, **further).train_dataloader()
    assert len(batch.images.unique()) > 1
    assert batch.extras == {}


def test_a_step_reads_images_and_stands_alone(declared: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shade reads images and no pairs: leave out pairs, or shade"):
        laion(tmp_path, shade=7, pairs=2)
    with pytest.raises(ValueError, match="shade and tint each make the image"):
        laion(tmp_path, shade=7, tint=8)

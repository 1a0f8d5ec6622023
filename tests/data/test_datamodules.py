"""DataModules on exported scenes and on the shared photos, and resuming inside a real Trainer."""

import gc
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from coca_lit.data.datamodule import CaptionDataModule, RootDataModule, ScenesDataModule
from coca_lit.data.datasets.captions import flickr_records, mscoco_records, nocaps_records
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.errors import DataError
from coca_lit.tools.prepare.scenes import export_scenes
from helpers.datamodules import TOKENIZER, fit
from helpers.scene_files import write_data_set
from helpers.shared_data import SHARED

FLICKR8K = SHARED / "flickr8k"


def laion(folder: Path, num_workers: int) -> LAIONDataModule:
    shards = folder / "shards"
    if not shards.exists():
        export_scenes("shards", shards, count=600, size=16)
    return LAIONDataModule(
        f"{shards}/*.tar", 24, tokenizer=TOKENIZER, batch_size=6, image_size=16, num_workers=num_workers
    )


def scenes() -> ScenesDataModule:
    return ScenesDataModule(tokenizer=TOKENIZER, batch_size=6, image_size=16, train_count=27, val_split=None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_training_sees_the_same_batches(tmp_path, num_workers):
    whole = fit(laion(tmp_path, num_workers), tmp_path / "whole")
    assert [epoch for epoch, *_ in whole] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({tuple(keys) for _, keys, *_ in whole}) == 12
    for step in (1, 3, 4, 6) if num_workers == 0 else (2,):  # within and between epochs
        assert (
            fit(laion(tmp_path, num_workers), tmp_path / "again", tmp_path / f"whole/step={step}.ckpt") == whole[step:]
        )


@pytest.mark.filterwarnings("ignore")
def test_a_training_resumed_twice_in_an_epoch_sees_the_same_batches(tmp_path):
    whole = fit(scenes(), tmp_path / "whole")
    fit(scenes(), tmp_path / "again", tmp_path / "whole/step=5.ckpt")
    assert fit(scenes(), tmp_path / "third", tmp_path / "again/step=6.ckpt") == whole[6:]


def test_exported_data_sets_are_read(tmp_path):
    for form in ("karpathy", "coco", "nocaps"):
        write_data_set(form, tmp_path / form, count=40, size=16)
    modules: list[CaptionDataModule] = [
        RootDataModule(str(tmp_path / "karpathy"), mscoco_records, tokenizer=TOKENIZER, batch_size=8, image_size=16),
        RootDataModule(str(tmp_path / "coco"), mscoco_records, tokenizer=TOKENIZER, batch_size=8, image_size=16),
    ]
    for data in modules:
        assert data.steps_per_epoch == len(data.train_records) // 8 == len(data.train_dataloader())
        batch = next(iter(data.train_dataloader()))
        assert batch.images.shape == (8, 3, 16, 16)
        assert len(batch.keys) == 8
        assert len(next(iter(data.val_dataloader())).keys) > 0
    domains = {record.domain for record in nocaps_records(tmp_path / "nocaps")}
    assert domains == {"in-domain", "near-domain", "out-domain"}


def test_scenes_are_never_cropped():
    data = ScenesDataModule(tokenizer=TOKENIZER, batch_size=4, image_size=32, train_count=8)
    pixels = {str(r.id): torch.from_numpy(np.array(r.image())).permute(2, 0, 1) for r in data.train_records}
    for batch in data.train_dataloader():
        for key, image in zip(batch.keys, batch.images, strict=True):
            assert torch.equal(image, pixels[key])


def test_workers_end_with_their_loader_and_wait_for_no_collector():
    before = set(multiprocessing.active_children())
    data = ScenesDataModule(tokenizer=TOKENIZER, batch_size=4, image_size=32, train_count=8, num_workers=1)
    gc.disable()
    try:
        loader = data.train_dataloader()
        next(iter(loader))
        assert set(multiprocessing.active_children()) > before
        del loader
        assert set(multiprocessing.active_children()) == before
    finally:
        gc.enable()


def test_numbers_that_cannot_work_are_refused():
    with pytest.raises(DataError, match=r"8 .*batch.* 9"):
        ScenesDataModule(tokenizer=TOKENIZER, batch_size=9, train_count=8).train_dataloader()
    with pytest.raises(DataError, match=r"built-in scenes: .*1000000"):
        ScenesDataModule(tokenizer=TOKENIZER, batch_size=9, train_count=1_000_000).train_dataloader()
    with pytest.raises(ValueError, match=r"batch_size .* got 0"):
        ScenesDataModule(tokenizer=TOKENIZER, batch_size=0)
    with pytest.raises(ValueError, match=r"num_workers.*-1"):
        ScenesDataModule(tokenizer=TOKENIZER, batch_size=4, num_workers=-1)


def test_floats_without_a_fraction_are_whole_numbers(tmp_path):
    """As YAML and Hydra read 1e6."""
    numbers = {"batch_size": 4.0, "image_size": 16.0, "num_workers": 0.0}
    data = ScenesDataModule(train_count=1e1, tokenizer=TOKENIZER, **numbers)
    assert len(data.train_records) == 10
    assert [len(batch.keys) for batch in data.train_dataloader()] == [4, 4]
    export_scenes("shards", tmp_path, count=20, size=16)
    shards = LAIONDataModule(str(tmp_path), 1e1, tokenizer=TOKENIZER, window=1e5, readers=2.0, **numbers)
    assert [len(batch.keys) for batch in shards.train_dataloader()] == [4, 4]
    for name, wrong in (("epoch_samples", 0.5), ("epoch_samples", 0), ("window", 2.5), ("readers", 1.5)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            LAIONDataModule(str(tmp_path), **{"epoch_samples": 9, "tokenizer": TOKENIZER, **numbers, name: wrong})
    for name in ("batch_size", "train_count", "image_size"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            ScenesDataModule(**{"tokenizer": TOKENIZER, **numbers, name: 1.5})


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="the shared Flickr8k is absent")
def test_shared_flickr8k():
    assert len(flickr_records(FLICKR8K, "train")) == 6000
    val = flickr_records(FLICKR8K, "val")
    assert len(val) == 1000
    assert {len(record.captions) for record in val} == {5}
    data = RootDataModule(str(FLICKR8K), flickr_records, tokenizer=TOKENIZER, batch_size=4, image_size=32)
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (4, 3, 32, 32)

"""A user's data sets: records made by hand, a function that returns them, and the arguments that all share."""

import inspect
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from coca_lit.cli.command import compose
from coca_lit.cli.train import resume_data
from coca_lit.data import ImageFile, Record
from coca_lit.data.datamodule import CaptionDataModule, RecordsDataModule
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.errors import DataError
from coca_lit.runs.resume import ResumePoint
from coca_lit.tokenizer import WordTokenizer

TOKENIZER = WordTokenizer(["a", "red", "green", "image"])


def my_records(split: str, root: str) -> list[Record]:
    """Five red images to train on, two green ones for validation."""
    colour, count = {"train": ("red", 5), "val": ("green", 2)}[split]
    return [Record(f"{split} {i}", f"{root}/{colour}.png", f"a {colour} image") for i in range(count)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for colour in ("red", "green"):
        Image.new("RGB", (20, 16), colour).save(tmp_path / f"{colour}.png")
    return tmp_path


def test_records_take_what_is_at_hand(root: Path) -> None:
    record = Record(1, root / "red.png", ["a red image", "a image"], "near-domain")
    assert record == (1, ImageFile(root / "red.png"), ("a red image", "a image"), "near-domain", "", ())
    assert record.image().getpixel((0, 0)) == (255, 0, 0)
    assert Record(1, str(root / "red.png"), "a red image").captions == ("a red image",)
    assert Record(1, partial(Image.new, "RGB", (1, 1))).captions == ()
    assert pickle.loads(pickle.dumps(record)) == record
    assert isinstance(record._replace(captions=()), Record)


def test_a_function_and_lists_give_the_same_batches(root: Path) -> None:
    shared = {"tokenizer": TOKENIZER, "batch_size": 2, "image_size": 8}
    function = partial(my_records, root=str(root))
    by_function = RecordsDataModule(function, **shared)
    by_lists = RecordsDataModule({split: function(split) for split in ("train", "val")}, **shared)
    assert by_function.steps_per_epoch == 2
    for loaders in zip(
        (by_function.train_dataloader(), by_function.val_dataloader()),
        (by_lists.train_dataloader(), by_lists.val_dataloader()),
        strict=True,
    ):
        for ours, theirs in zip(*loaders, strict=True):
            assert ours.keys == theirs.keys
            assert torch.equal(ours.images, theirs.images)
    orders = [[batch.keys for batch in by_lists.train_dataloader()] for _ in range(6)]
    assert len({str(keys) for keys in orders}) > 1  # each pass is another epoch
    (batch,) = by_lists.val_dataloader()
    assert batch.tokens.tolist() == [TOKENIZER.encode("a green image")] * 2
    with pytest.raises(DataError, match=r"train, val.*'test'"):
        by_lists.records("test")


@pytest.mark.parametrize(("count", "others"), [(5, "others"), (6, "6")])
def test_a_run_goes_on_with_the_records_that_it_began_with(root: Path, count: int, others: str) -> None:
    """Otherwise one that was trained on may be held out for scores."""
    shared = {"tokenizer": TOKENIZER, "batch_size": 2, "image_size": 8, "val_split": None}
    records = my_records("train", str(root))
    state = RecordsDataModule({"train": records}, **shared).state_dict()
    start = ResumePoint(root / "step_1.ckpt", {"RecordsDataModule": state})
    resume_data(RecordsDataModule({"train": records}, **shared), start, strict=True)
    resume_data(RecordsDataModule({"train": records}, **shared), ResumePoint(start.path, {}), strict=True)
    changed = [records[i % 5]._replace(id=f"new {i}") for i in range(count)]
    with pytest.raises(DataError, match=f"^the run began with 5 records .*, and now there are {others}: restore"):
        resume_data(RecordsDataModule({"train": changed}, **shared), start, strict=True)


def test_records_in_yaml(root: Path) -> None:
    (root / "conf" / "data").mkdir(parents=True)
    (root / "conf" / "data" / "mine.yaml").write_text(
        f"defaults: [records, _self_]\nrecords: {{_target_: {__name__}.my_records, root: '{root}'}}\nbatch_size: 5\n"
    )
    search = f"hydra.searchpath=[file://{root}/conf]"
    cfg = compose("train", [search, "data=mine", "evals=[]", "experiment=demo"])
    assert (cfg.data.batch_size, cfg.data.records.root, cfg.data.image_size) == (5, str(root), 32)
    data = instantiate(cfg.data, tokenizer=TOKENIZER, _convert_="all")
    (batch,) = data.train_dataloader()
    assert sorted(batch.keys) == [f"train {i}" for i in range(5)]


# Shared arguments


def defaults(target: type) -> dict[str, object]:
    parameters = inspect.signature(target).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@pytest.mark.parametrize(
    ("option", "targets"),
    [("scenes", [CaptionDataModule, RecordsDataModule]), ("laion", [CaptionDataModule, LAIONDataModule])],
)
@pytest.mark.slow
def test_yaml_has_the_defaults_of_the_constructors(option: str, targets: list[type]) -> None:
    node = compose("train", [f"data={option}", "experiment=demo"]).data
    known = {name: default for target in targets for name, default in defaults(target).items()}
    for name in node.keys() & known.keys() - {"image_size", "seed", "num_workers", "cache_dir", "epoch_samples"}:
        assert node[name] == known[name], name

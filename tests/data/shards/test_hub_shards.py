"""Data sets on the Hub are read at one commit, from the start of a run to its end, wherever their branches move."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as L
import pytest

from coca_lit.cli.train import resume_data
from coca_lit.data.batch import Batch
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.listing import find_shards
from coca_lit.data.shards.remote.store import StoreError, at_commit
from coca_lit.errors import DataError
from coca_lit.runs.resume import ResumePoint
from coca_lit.tokenizer import WordTokenizer
from coca_lit.tools.prepare.scenes import export_scenes
from helpers.hub_server import Hub, Repository
from helpers.running import run, watched

TINY = (
    *("trainer=cpu", "trainer.limit_val_batches=0", "data.batch_size=4", "evals=[]", "name=test", "data=laion"),
    *("data.num_workers=0", "data.epoch_samples=16", "+model.net.text_layers=1", "+model.net.decoder_layers=1"),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Two commits of data, as train/NAME and later/NAME."""
    found = {}
    for name, count in (("train", 12), ("later", 9)):
        folder = tmp_path_factory.mktemp(name)
        export_scenes("shards", folder, count=count, size=32)
        found |= {f"{name}/{path.name}": path.read_bytes() for path in folder.rglob("*.tar")}
    return found


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": False})
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        fsspec.get_filesystem_class("hf").clear_instance_cache()
        hub.repositories["org/set"] = Repository(dict(files))
        yield hub
        fsspec.get_filesystem_class("hf").clear_instance_cache()


def move(hub: Hub, files: dict[str, bytes]) -> str:
    """A push to main that replaces the training shards; its commit."""
    later = [content for name, content in files.items() if name.startswith("later/")]
    return hub.repositories["org/set"].commit({"train/new.tar": later[0]})


def test_names_and_revisions(hub: Hub, files: dict[str, bytes]) -> None:
    repository = hub.repositories["org/set"]
    (first,) = repository.commits
    second = move(hub, files)
    repository.branches |= {"old": first, "refs/pr/1": first}
    commits: dict[str, str] = {}
    for name, expected in (
        ("hf://datasets/org/set/train/*.tar", f"hf://datasets/org/set@{second}/train/*.tar"),
        ("hf://datasets/org/set", f"hf://datasets/org/set@{second}"),
        ("hf://datasets/org/set@old/a.tar", f"hf://datasets/org/set@{first}/a.tar"),
        ("hf://datasets/org/set@refs%2Fpr%2F1/a.tar", f"hf://datasets/org/set@{first}/a.tar"),
        (f"hf://datasets/org/set@{first}/a.tar", f"hf://datasets/org/set@{first}/a.tar"),
        ("s3://bucket/org/set/a.tar", "s3://bucket/org/set/a.tar"),
        ("/data/datasets/org/set/a.tar", "/data/datasets/org/set/a.tar"),
    ):
        assert at_commit(name, commits, 0) == expected, name
    assert commits == {"org/set@main": second, "org/set@old": first, "org/set@refs%2Fpr%2F1": first}
    names = [shard.name for shard in find_shards("hf://datasets/org/set@old/{train,later}/*.tar")]
    assert {name.removeprefix(f"hf://datasets/org/set@{first}/") for name in names} == files.keys()
    for missing in ("hf://datasets/org/set@gone/train/*.tar", "hf://datasets/org/none/train/*.tar"):
        with pytest.raises(DataError, match="shards not found"):
            find_shards(missing)
    repository.gated = True
    with pytest.raises(StoreError, match="credentials"):
        find_shards("hf://datasets/org/set/train/*.tar")


class Keys(L.Callback):
    def __init__(self) -> None:
        self.keys: list[str] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, step: int) -> None:
        self.keys += batch.keys


@pytest.mark.slow
def test_a_run_stays_at_its_commit_and_records_it(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first,) = hub.repositories["org/set"].commits
    keys = Keys()

    def train(folder: str, steps: int) -> dict[str, Any]:
        keys.keys.clear()
        shards = "data.shards=hf://datasets/org/set/train/*.tar"
        with watched(keys):
            run(tmp_path / folder, *TINY, shards, f"data.cache_dir={tmp_path}/cache", f"trainer.max_steps={steps}")
        return json.loads((tmp_path / folder / "environment.json").read_text())["data_commits"]

    assert train("run", 2) == {"org/set@main": first}
    assert f"commits org/set@main is {first[:10]}" in capsys.readouterr().out
    second = move(hub, files)
    fsspec.get_filesystem_class("hf").clear_instance_cache()  # as in another process
    assert train("run", 4) == {"org/set@main": first}
    assert len(keys.keys) == 8
    assert all(f"@{first}/train/" in key for key in keys.keys)
    assert train("other", 1) == {"org/set@main": second}
    assert all(f"@{second}/train/new.tar" in key for key in keys.keys)


def test_a_resumed_run_knows_its_commit_before_lightning_restores_it(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    """Which comes after the length of an epoch was asked for where the network is sharded."""
    others = {"tokenizer": WordTokenizer(["a"]), "batch_size": 4, "cache_dir": str(tmp_path)}
    pattern = "hf://datasets/org/set/train/*.tar"
    start = ResumePoint(tmp_path, {"LAIONDataModule": LAIONDataModule(pattern, None, **others).state_dict()})
    move(hub, files)
    fsspec.get_filesystem_class("hf").clear_instance_cache()  # as in another process
    data = LAIONDataModule(pattern, None, **others)
    data.prepare_data()
    assert data.epoch_samples == 9
    resume_data(data, start, strict=True)
    assert data.epoch_samples == 12


def test_every_process_reads_at_the_commit_of_the_first(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    (first,) = hub.repositories["org/set"].commits
    others = {"tokenizer": WordTokenizer(["a"]), "batch_size": 4, "cache_dir": str(tmp_path)}
    data = LAIONDataModule("hf://datasets/org/set/train/*.tar", 16, **others)
    move(hub, files)
    data.shards  # noqa: B018  # listed too late

    class Strategy:
        def broadcast(self, commits: dict[str, str]) -> dict[str, str]:
            return {"org/set@main": first}

    data.trainer = type("Trainer", (), {"strategy": Strategy()})()
    data.setup("fit")
    assert {shard.name.partition("@")[2][:40] for shard in data.shards[""]} == {first}

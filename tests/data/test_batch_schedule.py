"""Batches of another source between batches of pairs: what a schedule of one's own is asked for, and the keys by which
a project lets it be chosen.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from coca_lit import extensions
from coca_lit.cli.assembly import build_data
from coca_lit.cli.module import build_module
from coca_lit.cli.schema import argument_defaults, unresolved
from coca_lit.data.datamodule import ScenesDataModule
from coca_lit.errors import ConfigError, DataError
from coca_lit.extensions import DeclaredSchedule
from coca_lit.models.presets import VOCABULARIES
from coca_lit.tokenizer import WordTokenizer
from helpers.running import compose, run
from helpers.schedules import NoiseBetween

SMALL: dict[str, Any] = {
    "tokenizer": WordTokenizer(VOCABULARIES["scenes"]),
    "batch_size": 4,
    "image_size": 16,
    "train_count": 16,
}
KEYS = ("data.noise_every", "model.noise_weight")


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A project declares the schedule."""
    schedules = {"noise": DeclaredSchedule("helpers.schedules:NoiseBetween", KEYS)}
    monkeypatch.setattr(extensions, "batch_schedules", lambda: schedules)
    extensions.schedule_keys.cache_clear()
    yield
    extensions.schedule_keys.cache_clear()


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_two_sources_from_any_step(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the pairs stays, also where their workers would go on with the next epoch."""
    alone = [batch.keys for batch in ScenesDataModule(**SMALL).train_dataloader()]
    data = ScenesDataModule(**SMALL, num_workers=workers, batch_schedule=NoiseBetween(7, noise_every=3))
    for epoch in (0, 1):
        monkeypatch.setattr(data, "position", lambda epoch=epoch: (epoch, 0))
        loader = data.train_dataloader()
        whole = list(loader)
        assert len(loader) == len(whole) == data.batches_per_epoch == 6
        assert ["noise" in batch.extras for batch in whole] == [False, False, True] * 2
        if epoch == 0:
            assert [batch.keys for batch in whole if "noise" not in batch.extras] == alone
        for done in range(1, 6):
            monkeypatch.setattr(data, "position", lambda at=(epoch, done): at)
            rest = list(data.train_dataloader())
            assert [batch.keys for batch in rest] == [batch.keys for batch in whole[done:]]
            assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(rest, whole[done:], strict=True))


def test_data_that_are_missing_are_found_before_the_training() -> None:
    with pytest.raises(DataError, match="no such noise"):
        ScenesDataModule(**SMALL, batch_schedule=NoiseBetween(-1)).prepare_data()


def test_keys_of_a_project_ask_for_its_schedule(declared: None) -> None:
    cfg = compose("experiment=scenes", "data.noise=5", "data.noise_every=4", "model.noise_weight=0.5")
    module = build_module(cfg)
    data = build_data(cfg, module.net.tokenizer)
    assert isinstance(data.batch_schedule, NoiseBetween)
    assert (data.batch_schedule.noise, data.batch_schedule.every) == (5, 4)
    assert module.every_objective[-1].weights == {"noise": 0.5}
    without = compose("experiment=scenes", "data.noise=null", "data.noise_every=4", "model.noise_weight=0.5")
    assert build_module(without).batch_schedule is None
    assert build_data(without, module.net.tokenizer).batch_schedule is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data.noise=5", "data.noise_every=1.5"), r"^data\.noise_every must be a whole number, got 1\.5"),
        (("data.noise=5", "data.noise_evry=2"), r"no key 'data\.noise_evry'; did you mean 'data\.noise_every'"),
        (("data.noise=5", "data.noise_weight=2"), r"no key 'data\.noise_weight'; did you mean 'model\.noise_weight'"),
        (("model.noise=5",), r"no key 'model\.noise'"),
    ],
)
def test_keys_of_a_project_are_checked_like_arguments(declared: None, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose("experiment=scenes", *words)


def test_a_value_that_the_schedule_refuses_names_the_key(declared: None) -> None:
    cfg = compose("experiment=scenes", "data.noise=5", "model.noise_weight=-1")
    with pytest.raises(ConfigError, match=r"^data\.noise: noise_weight must be"):
        build_module(cfg)


def test_a_default_that_is_written_out_is_no_change(declared: None) -> None:
    cfg = unresolved(compose("experiment=scenes", "data.noise=5", "data.noise_every=2"))
    assert argument_defaults(cfg)["data"]["noise_every"] == 2


def test_no_project_is_asked_for_its_schedule_without_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    schedules = {"noise": DeclaredSchedule("nowhere:Schedule", KEYS)}
    monkeypatch.setattr(extensions, "batch_schedules", lambda: schedules)
    extensions.schedule_keys.cache_clear()
    build_module(compose("experiment=scenes"))
    with pytest.raises(ConfigError, match="nowhere"):
        build_module(compose("experiment=scenes", "data.noise=5"))
    extensions.schedule_keys.cache_clear()


@pytest.mark.slow
def test_a_run_with_a_schedule_of_ones_own(tmp_path: Path) -> None:
    """By its class, without a project."""
    run(
        tmp_path,
        *("experiment=scenes", "trainer=cpu", "trainer.max_epochs=1", "trainer.log_every_n_steps=1", "evals=[]"),
        *("data.train_count=32", "data.batch_size=8", "model.warmup_steps=1", "trainer.limit_val_batches=0"),
        *("model.freeze=[image_encoder]", "trainer.micro_batch_size=4"),
        "data.batch_schedule={_target_: helpers.schedules.NoiseBetween, noise: 5}",
    )
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/noise_loss"] or row["train/caption_loss"]]
    assert [bool(row["train/noise_loss"]) for row in rows] == [False, True] * 4
    assert [bool(row["train/contrastive_loss"]) for row in rows] == [True, False] * 4

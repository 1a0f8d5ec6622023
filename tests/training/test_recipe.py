"""Values chosen by the photos, their texts and the machine."""

import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coca_lit.data import Record
from coca_lit.data.datamodule import RecordsDataModule
from coca_lit.data.scenes.render import render
from coca_lit.errors import ConfigError
from coca_lit.models import create_model
from coca_lit.tokenizer import WordTokenizer
from coca_lit.training import recipe
from coca_lit.training.recipe import Basis, choose, small_data, start, vocabulary


def facts(photos: int, **others: Any) -> Basis:
    given = {"captions": photos, "counts": Counter({"a": 9}), "cores": 4, "gpu": False, "free_bytes": 10**12}
    return Basis(photos, **{**given, **others})


def values(photos: int, **others: Any) -> dict[str, Any]:
    return {choice.key: choice.value for choice in choose(facts(photos, **others))}


@pytest.mark.parametrize(
    ("photos", "batch", "epochs", "views"),
    [(1, 1, 60, 6), (4, 2, 60, 6), (45, 8, 60, 6), (450, 64, 33, 6), (45_000, 128, 3, 2)],
)
def test_amounts(photos: int, batch: int, epochs: int, views: int) -> None:
    chosen = values(photos)
    assert chosen["data.batch_size"] == batch <= photos
    assert chosen["trainer.max_epochs"] == epochs
    assert chosen["data.cached_augmentations"] == views
    assert 0.9 <= chosen["ema"] < 1
    assert chosen["model.warmup_steps"] <= photos // batch * epochs / 10


def test_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert values(45_000, gpu=True)["data.batch_size"] == 256
    assert values(4500, gpu=True)["trainer.max_epochs"] > 3 * values(4500)["trainer.max_epochs"]
    assert values(4500, free_bytes=10**8)["data.cached_augmentations"] == 0
    assert values(4500, view_bytes=None)["data.cached_augmentations"] == 0
    assert [values(photos)["data.num_workers"] for photos in (999, 1000)] == [0, 3]
    monkeypatch.setattr(sys, "platform", "darwin")  # where each worker imports PyTorch
    assert values(1000)["data.num_workers"] == 0


def test_fewer_steps_than_the_epochs_have() -> None:
    chosen = values(450, steps=30)
    assert chosen["model.warmup_steps"] == 3
    assert chosen["ema"] == 0.9  # of the last ten steps
    assert values(450, steps=-1) == values(450) == values(450, steps=10**6)


def test_steps_alone_end_the_run() -> None:
    """450 photos in batches of 64 are 7 steps an epoch."""
    assert values(450, epochs=-1, steps=35) == values(450, epochs=5)
    assert values(450, epochs=-1, steps=36) == values(450, epochs=6, steps=36)
    assert values(450, epochs=-1, steps=1000)["model.warmup_steps"] == 100
    assert values(450, epochs=-1)["model.warmup_steps"] == values(450)["model.warmup_steps"]


def test_vocabularies() -> None:
    assert vocabulary(Counter({"a": 900, "dog": 70, "cat": 30}))[0] == 5
    assert vocabulary(Counter({"a": 900, "dog": 50, **{f"b{i}": 3 for i in range(20)}}))[0] == 3
    assert vocabulary(Counter({"a": 90, "dog": 1, "cat": 1, "cow": 1, "pig": 1}))[0] == 1
    assert vocabulary(Counter({f"长句{i}": 1 for i in range(50)}))[0] is None
    assert vocabulary(Counter({f"b{i}": 9 for i in range(30_000)}))[0] is None


def test_a_tokenizer_that_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_encoder(monkeypatch, ModuleSpec("any", None))
    for given, kept in (({}, False), ({"model.net.tokenizer.file": "tokenizer.json"}, True)):
        chosen = {choice.key: choice.value for choice in small_data(data_of(8), {"init_from": None, **given}, None)[1]}
        assert (chosen["vocabulary"] is None) == kept


def data_of(count: int) -> RecordsDataModule:
    records = {"train": [Record(i, render(i).copy, f"a dog and {i}") for i in range(count)], "val": []}
    return RecordsDataModule(records, tokenizer=WordTokenizer(["a"]), batch_size=1)


def offer_encoder(monkeypatch: pytest.MonkeyPatch, spec: ModuleSpec | None) -> None:
    """Lets the recipe alone find the package of the ImageNet encoder, or not."""
    monkeypatch.setattr(recipe, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: spec)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "coca_lit" / "views"


def test_the_photo_model_starts_few_photos_whose_words_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(tokenizer=WordTokenizer(["a", "dog", "runs"]))
    loaded: list[str] = []
    monkeypatch.setattr(recipe, "load_model", lambda name: loaded.append(name) or model)
    for photos, text, name in (
        (5000, "A dog runs", "photos"),
        (5001, "A dog runs", None),
        (20, "a dog " * 10 + "barks", "photos"),  # one of 21 words
        (20, "a dog " * 9 + "barks", None),  # one of 19
        (20, "ein Hund rennt", None),
    ):
        choice, source = start(photos, [text])
        assert (choice.key, choice.value, source) == ("init_from", name, model if name else None)
        assert f"init_from={'null' if name else 'photos'}" in choice.why
    assert loaded == ["photos"] * 4  # not above 5,000


def test_a_start_that_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_encoder(monkeypatch, ModuleSpec("any", None))
    records = {"train": [Record(i, render(i).copy, "a dog runs on the beach") for i in range(8)]}
    data = RecordsDataModule(records, tokenizer=WordTokenizer(["a"]), batch_size=1)
    chosen = {choice.key: choice.value for choice in small_data(data, {}, None)[1]}
    assert (chosen["init_from"], chosen["image_size"]) == ("photos", 256)
    chosen = {choice.key: choice.value for choice in small_data(data, {"init_from": None}, None)[1]}
    assert "init_from" not in chosen
    assert chosen["image_size"] == 224


def test_views_are_kept_for_all_runs_or_where_that_cannot_be_in_the_run_folder(cache: Path) -> None:
    def folder(given: dict[str, Any]) -> str | None:
        choices = small_data(data_of(8), {"init_from": "x", **given}, create_model("coca_tiny"))[1]
        return next((choice.value for choice in choices if choice.key == "data.cache_dir"), None)

    assert folder({}) == str(cache)
    assert folder({"data.cache_dir": "/elsewhere"}) is None
    cache.rmdir()
    cache.write_text("not a folder")
    assert folder({}) == "${output_dir}/views"


def test_weights_bring_their_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    source = create_model("coca_tiny", pooler="cascade")
    offer_encoder(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"coca_lit\[pretrained\]"):
        small_data(data_of(8), {"init_from": None}, None)
    what, choices = small_data(data_of(8), {"init_from": "outputs/x", "trainer.max_epochs": 2}, source)
    assert what.startswith("8 photos")
    chosen = {choice.key: choice.value for choice in choices}
    assert (chosen["image_size"], chosen["model.warmup_steps"], chosen["data.cached_augmentations"]) == (32, 0, 2)
    net = chosen["model.net"]
    rebuilt = create_model(**net, image_size=32)
    assert rebuilt.config.stored() == source.config.stored()


@pytest.mark.parametrize("given", [{"model.freeze": []}, {"lora.rank": 4}])
def test_an_encoder_that_trains_is_not_cached(given: dict[str, Any]) -> None:
    cached = small_data(data_of(8), {"init_from": "x"}, create_model("coca_tiny"))[1]
    trained = small_data(data_of(8), {"init_from": "x", **given}, create_model("coca_tiny"))[1]
    views = [next(c.value for c in choices if c.key == "data.cached_augmentations") for choices in (cached, trained)]
    assert views[0] > 0 == views[1]

"""Mixtures of shard sets and of captions: exact proportions, the same after a resume, counted by source."""

import json
import math
from collections import Counter
from itertools import islice
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from coca_lit.callbacks import SourceCounts
from coca_lit.data.mixture import draw, weighted_round_robin
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.distributed import rank, world_size
from coca_lit.errors import DataError
from coca_lit.tokenizer import WordTokenizer
from coca_lit.tools.prepare.command import data as coca_data
from helpers.datamodules import TOKENIZER, fit
from helpers.shards import contents, jpeg, spoil, write_shards, write_tar


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two shard sets; the names in b are made different from those in a by a prefix."""
    root = tmp_path_factory.mktemp("sets")
    for name, shards, size in (("a", 4, 9), ("b", 2, 6)):
        (root / name).mkdir()
        write_shards(root / name, shards, size)
        coca_data(["check", str(root / name), "--workers", "1"])
    return {name: str(root / name) for name in ("a", "b")}


def mixture(folders: dict[str, str], workers: int = 0, **more) -> LAIONDataModule:
    return LAIONDataModule(folders, 80, tokenizer=TOKENIZER, batch_size=10, image_size=16, num_workers=workers, **more)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.7, 0.3], [1, 2, 4], [0.9, 0.05, 0.03, 0.02], [1 / 3] * 3])
def test_shares_are_kept_in_every_stretch(weights):
    given = Counter()
    for n, (name, _) in enumerate(islice(weighted_round_robin(weights, [0] * len(weights)), 1000), start=1):
        given[name] += 1
        assert all(abs(given[i] - n * w / sum(weights)) <= 1 for i, w in enumerate(weights))


def test_captions_are_drawn_by_the_weights_of_those_that_are_there():
    options = {"txt": ("short",), "long": ("long 1", "long 2")}
    drawn = Counter(draw(options, {"txt": 0.2, "long": 0.8, "absent": 5}, "caption", seed) for seed in range(2000))
    assert drawn["short"] == pytest.approx(400, abs=60)
    assert drawn["long 1"] == pytest.approx(800, abs=80)
    assert draw({"txt": ("short",)}, {"txt": 0.2, "long": 0.8}, "caption", 0) == "short"


def test_a_broken_sample_is_replaced_by_one_of_its_own_source(folders, tmp_path):
    """Half of the second source is broken, and still every batch has its share."""
    (path,) = write_shards(tmp_path, 1, 12)
    spoil(path, {f"0{i:04d}.jpg": b"junk" for i in range(0, 12, 2)})
    sources = {"a": folders["a"], "b": str(tmp_path)}
    data = mixture(sources, weights={"a": 0.7, "b": 0.3}, max_bad_fraction=1.0)
    found = list(data.train_dataloader())
    assert sum(len(batch.bad) for batch in found) > 5
    for batch in found:
        assert Counter(batch.extras["source"]) == {"a": 7, "b": 3}
        assert all(
            key.startswith(sources[source]) for key, source in zip(batch.keys, batch.extras["source"], strict=True)
        )


@pytest.mark.parametrize("weights", [None, {"a": 0.7, "b": 0.3}])
def test_an_empty_set_is_named(folders, tmp_path, weights):
    write_tar(tmp_path / "0.tar", {})
    data = mixture(folders | {"b": str(tmp_path)}, weights=weights, max_bad_fraction=0.5)
    with pytest.raises(DataError, match="shards of 'b' hold no samples"):
        next(iter(data.train_dataloader()))


def test_without_weights_every_sample_comes_as_often(folders):
    data = LAIONDataModule(folders, None, tokenizer=TOKENIZER, batch_size=12, image_size=16)
    (source_a, source_b) = data.sources
    assert (source_a.weight, source_b.weight, data.steps_per_epoch) == (36, 12, 4)
    counts = Counter(
        key for batch in data.train_dataloader() for key in zip(batch.extras["source"], batch.keys, strict=True)
    )
    assert set(counts.values()) == {1}
    assert len(counts) == 48


def test_several_captions_of_a_field(tmp_path):
    texts = {"captions": ["a dog", " ", "number", 7]}
    members = {f"{i}.{end}": x for i in range(4) for end, x in (("jpg", jpeg(i)), ("json", json.dumps(texts).encode()))}
    path = write_tar(tmp_path / "x.tar", members)
    tokenizer = WordTokenizer(["a", "dog", "number"])
    data = LAIONDataModule(str(path), 80, tokenizer=tokenizer, batch_size=4, image_size=16, caption_keys="captions")
    rows = [row for batch in data.train_dataloader() for row in batch.tokens.tolist()]
    said = Counter(tokenizer.decode(row) for row in rows)
    assert set(said) == {"a dog", "number"}
    assert said["number"] == pytest.approx(40, abs=15)


def test_several_captions_of_an_image_are_drawn_each_by_its_probability(tmp_path):
    text = json.dumps({"long": "a dog"}).encode()
    members = {f"{i}.{end}": x for i in range(4) for end, x in (("jpg", jpeg(i)), ("json", text), ("txt", b"number"))}
    path, tokenizer = write_tar(tmp_path / "x.tar", members), WordTokenizer(["a", "dog", "number"])
    options = {"tokenizer": tokenizer, "batch_size": 4, "image_size": 16, "caption_keys": {"txt": 0.3, "long": 0.7}}
    one, three = (LAIONDataModule(str(path), 800, captions=count, **options).train_dataloader() for count in (1, 3))
    said = Counter()
    for batch, other in zip(three, one, strict=True):
        assert contents(batch) == contents(other)
        for rows in zip(batch.tokens, *batch.extras["further_tokens"].unbind(dim=1), strict=True):
            said[tuple(tokenizer.decode(row) for row in rows)] += 1
    for texts, count in said.items():
        expected = math.prod([{"number": 0.3, "a dog": 0.7}[text] for text in texts])
        assert count == pytest.approx(800 * expected, abs=60)
    assert len(said) == 8


def test_samples_of_each_source_are_logged_and_counted_on(folders, tmp_path):
    counts = SourceCounts()
    data = mixture(folders, weights={"a": 0.7, "b": 0.3})
    fit(data, tmp_path / "c", log=counts)  # three epochs of eight batches of ten
    assert counts.total() == {"a": 168, "b": 72}
    fit(data, tmp_path / "d", tmp_path / "c" / "step=10.ckpt", log=(resumed := SourceCounts()))
    assert resumed.total() == counts.total()


def test_a_process_that_begins_with_texts_alone_logs_the_counts_so_far():
    counts, logged = SourceCounts(), []
    counts.load_state_dict({"a": 20, "b": 10})
    trainer = Mock(global_step=1, log_every_n_steps=1)
    trainer.fit_loop.epoch_loop._should_accumulate.return_value = False
    counts.on_train_batch_end(trainer, Mock(log_dict=logged.append), None, SimpleNamespace(extras={}), 0)
    assert logged == [{"samples/a": 20.0, "samples/b": 10.0}]


def counted(folders: dict[str, str]) -> tuple[dict[str, int], list[dict[str, float]], dict[str, int]]:
    """Samples of this rank by source, what is logged after each step, and the state that is saved."""
    data = mixture(folders, weights={"a": 1, "b": 1})
    data.trainer = SimpleNamespace(global_rank=rank(), world_size=world_size())
    loader = data.train_dataloader()
    counts, own, logged = SourceCounts(), Counter(), []
    counts.load_state_dict({"a": 20, "b": 20})  # as every version of it has saved
    for step, batch in enumerate(loader.batches_from(0, 0), start=1):
        own.update(batch.extras["source"])
        trainer = Mock(global_step=step, log_every_n_steps=1)
        trainer.fit_loop.epoch_loop._should_accumulate.return_value = False
        counts.on_train_batch_end(trainer, Mock(log_dict=logged.append), None, batch, step)
    return dict(own), logged, counts.state_dict()


@pytest.mark.slow
def test_sources_are_counted_on_the_rank_that_trains_on_them(folders, on_ranks):
    """Equal weights alternate, so each of two ranks sees one source only."""
    (own_a, *found), (own_b, *same) = on_ranks(2, counted, folders)
    assert (own_a, own_b) == ({"a": 40}, {"b": 40})
    logged = [{"samples/a": 20.0 + 5 * step, "samples/b": 20.0 + 5 * step} for step in range(1, 9)]
    assert found == same == [logged, {"a": 60, "b": 60}]

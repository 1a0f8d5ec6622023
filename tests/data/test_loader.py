"""Order, resume position and randomness of indexed data: independent of workers, ranks and where the run stopped."""

import multiprocessing
import random
import sys
from functools import partial
from itertools import chain
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from coca_lit import extensions
from coca_lit.data.batch import Batch, Example, collate
from coca_lit.data.datamodule import RecordsDataModule
from coca_lit.data.examples import CaptionDataset, FirstCaptionDataset, Index
from coca_lit.data.loader import Planned, Schedule, TrainLoader, training_loader, validation_loader
from coca_lit.data.prefetch import worker_errors, worker_options
from coca_lit.data.records import Record
from coca_lit.data.transforms import RandomCrop, build_transform
from coca_lit.errors import DataError
from coca_lit.extensions import DeclaredSizes
from coca_lit.tokenizer import WordTokenizer
from helpers.epochs import check_killed_runs, epoch_batches, open_epoch
from helpers.fuzzing import fuzz

TOKENIZER = WordTokenizer(["a", "b", "c", "dog"])


def noise(i: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 50 + i, 3), dtype=np.uint8))


@pytest.fixture
def records() -> list[Record]:
    captions = ("a", "a b", "a b c", "a b c dog")
    return [Record(f"r{i}", partial(noise, i), captions) for i in range(23)]


@pytest.fixture
def dataset(records) -> CaptionDataset:
    return CaptionDataset(records, RandomCrop(16), TOKENIZER, seed=5)


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert [batch.keys for batch in first] == [batch.keys for batch in second]
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_collate_pads_to_the_longest_caption_only():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    batch = collate([Example(image, [1, 5, 2], "x"), Example(image, [1, 6, 7, 2], "y")], pad_id=0)
    assert batch.tokens.tolist() == [[1, 5, 2, 0], [1, 6, 7, 2]]
    assert batch.lengths.tolist() == [3, 4]
    assert (batch.keys, batch.images.shape, batch.images.dtype) == (["x", "y"], (2, 3, 2, 2), torch.uint8)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.tokens.dtype == batch.lengths.dtype == torch.int64


def test_extras_are_stacked_and_tensors_move_to_the_device_but_no_lengths():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    own = [{"depth": torch.full((2,), float(i)), "said": ("a",) * i, "more_lengths": torch.tensor(i)} for i in (1, 2)]
    batch = collate([Example(image, [1, 2], "", extras=extras) for extras in own], pad_id=0)
    assert batch.extras["depth"].tolist() == [[1, 1], [2, 2]]
    assert batch.extras["said"] == [("a",), ("a", "a")]
    moved = batch.to(torch.device("meta")).extras
    assert (moved["depth"].device.type, moved["more_lengths"].tolist()) == ("meta", [1, 2])
    assert moved["said"] is batch.extras["said"]
    with pytest.raises(DataError, match=r"extras \['depth'\] and \['said'\]"):
        collate([Example(image, [1, 2], "", extras={name: 1}) for name in ("depth", "said")], pad_id=0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_several_captions_of_an_image_differ_and_depend_on_seed_epoch_and_id(records):
    dataset = CaptionDataset(records, RandomCrop(16), TOKENIZER, seed=5, captions=3)
    indices = [[Index(turn, i) for i in (3, 1, 8)] for turn in range(40)]
    batches = [*training_loader(dataset, indices, 0, num_workers=0)]
    said = set()
    for batch in batches:
        tokens, lengths = batch.extras["further_tokens"], batch.extras["further_lengths"]
        assert tokens.shape == (3, 2, int(lengths.max()))
        for first, further, counts in zip(batch.tokens, tokens, lengths, strict=True):
            texts = [TOKENIZER.decode(row) for row in (first, *further)]
            assert len(set(texts)) == 3
            assert {*texts} <= {"a", "a b", "a b c", "a b c dog"}
            assert counts.tolist() == [len(text.split()) + 2 for text in texts[1:]]
            said.add(tuple(texts))
    assert len(said) == 24  # all orders of three of four captions
    again = [*training_loader(dataset, indices, 0, num_workers=1)]
    assert [b.extras["further_tokens"].tolist() for b in again] == [
        b.extras["further_tokens"].tolist() for b in batches
    ]
    plain = CaptionDataset(records, RandomCrop(16), TOKENIZER, seed=5)
    assert_equal(batches, [*training_loader(plain, indices, 0, num_workers=0)])
    other = training_loader(dataset, [[Index(0, 8), Index(0, 3)]], 0, num_workers=0)
    assert next(iter(other)).extras["further_tokens"][1].tolist() == batches[0].extras["further_tokens"][0].tolist()


def test_captions_repeat_where_an_image_has_too_few():
    record = Record("x", partial(noise, 0), ("a", "a b"))
    image = build_transform(size=16)
    assert FirstCaptionDataset([record], image, TOKENIZER)[0].further_tokens == ()
    example = FirstCaptionDataset([record], image, TOKENIZER, captions=4)[0]
    assert [TOKENIZER.decode(row) for row in (example.tokens, *example.further_tokens)] == ["a", "a b", "a", "a b"]


class Uneven(Schedule):
    """Batches of 2 and of 4 samples in turn, with budgets of 4 and 2."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples, 2)
        self.samples = samples - samples % 6

    def __len__(self) -> int:
        return self.samples // 6 * 2

    def at(self, number: int) -> Planned:
        turn, second = divmod(number, 2)
        return Planned(6 * turn + 2 * second, 2 + 2 * second, 4 - 2 * second)


class Drawn(Uneven):
    """The same, chosen by an argument of a data set."""

    def __init__(self, samples: int, batch_size: int, value: Any, seed: int) -> None:
        super().__init__(samples)
        self.given = (batch_size, value, seed)


def test_a_declared_argument_chooses_the_schedule(records, monkeypatch):
    declared = DeclaredSizes(f"{__name__}:Drawn", "sizes")
    monkeypatch.setattr(extensions, "batch_sizes", lambda: {"growing": declared, "shrinking": declared})
    build = partial(RecordsDataModule, {"train": records}, tokenizer=TOKENIZER, batch_size=2, seed=7)
    data = build(growing=[4, 2])
    assert data.schedule(23).given == (2, [4, 2], 7)
    assert data.steps_per_epoch == 6
    assert type(build(growing=[]).schedule(23)) is Schedule
    with pytest.raises(ValueError, match="growing and shrinking plan batches"):
        build(growing=[4], shrinking=[2])
    with pytest.raises(ValueError, match=r"'growin'.*'growing'"):
        build(growin=[4])


@pytest.mark.parametrize("schedule", [Schedule(52, 6), Uneven(52)])
@fuzz
@given(st.data())
def test_a_killed_run_gets_the_same_batches_on_any_ranks(schedule: Schedule, data: st.DataObject) -> None:
    check_killed_runs(52, schedule, data)


def test_an_epoch_holds_every_sample_once_in_a_new_order():
    first, second, other = (epoch_batches(23, Schedule(23, 4), *seed) for seed in ((1, 0), (1, 1), (2, 0)))
    for turn, batches in enumerate((first, second)):
        assert [len(batch) for batch in batches] == [4] * 5  # 23 // 4
        assert len({index for batch in batches for index in batch if index.turn == turn}) == 20
    orders = {tuple(index.i for batch in batches for index in batch) for batches in (first, second, other)}
    assert len(orders) == 3


def test_samples_that_belong_together_follow_each_other():
    batches = epoch_batches(24, Schedule(24, 6), seed=1, epoch=0, together=3)
    assert sorted(index.i for batch in batches for index in batch) == list(range(24))
    for batch in batches:
        for first in (0, 3):
            begin = batch[first].i
            assert [index.i for index in batch[first : first + 3]] == [begin, begin + 1, begin + 2]
            assert begin % 3 == 0
    assert [batch[0].i for batch in batches] != sorted(batch[0].i for batch in batches)


def test_examples_are_keyed_by_seed_epoch_and_record(dataset, records):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    examples = [dataset[Index(epoch, 3)] for epoch in range(40)]
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left as it was
    random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(dataset[Index(7, 3)].image, examples[7].image)
    assert dataset[Index(7, 3)].tokens == examples[7].tokens
    assert {len(example.tokens) for example in examples} == {3, 4, 5, 6}  # all four captions are drawn
    assert len({example.image.numpy().tobytes() for example in examples}) > 20  # crops differ
    other = CaptionDataset(records, dataset.transform, TOKENIZER, seed=6)
    assert any(other[Index(epoch, 3)].tokens != example.tokens for epoch, example in enumerate(examples))


def test_train_loader_asks_for_the_position_at_the_first_batch():
    position = (0, 0)
    loader = TrainLoader(5, lambda epoch, start: ((epoch, step) for step in range(start, 99)), lambda: position)
    iterator = iter(loader)
    position = (2, 3)  # what restoring a checkpoint does after iter()
    assert list(iterator) == [(2, 3), (2, 4)]
    assert len(loader) == 5


def _collate_and_say_where(examples: list[Example]) -> Batch:
    batch = collate(examples, 0)
    return batch._replace(keys=[str(batch.images.is_shared())])


def test_a_worker_writes_a_batch_where_the_training_process_reads_it():
    pixels = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    examples = [Example(image, [1, 2], "") for image in pixels]
    (batch,) = DataLoader(examples, batch_size=2, num_workers=1, collate_fn=_collate_and_say_where)
    assert batch.keys == ["True"]
    assert torch.equal(batch.images, pixels)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
def test_workers_are_forked_whatever_python_starts_by_itself(monkeypatch):
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", get_context("forkserver"))
    loader = DataLoader([3, 5], **worker_options(1), collate_fn=lambda numbers: numbers)  # which cannot be sent
    assert list(loader) == [[3], [5]]


def test_workers_live_on_in_the_next_epoch(records):
    dataset, opened, position = CaptionDataset(records, RandomCrop(16), TOKENIZER, seed=5), [], [0, 0]

    def batches_from(epoch, start):
        opened.append((epoch, start))
        return open_epoch(dataset, 4, epoch, start, num_workers=1, endless=True)

    before = multiprocessing.active_children()
    loader = TrainLoader(5, batches_from, lambda: tuple(position), endless=True)
    expected = [list(open_epoch(dataset, 4, epoch)) for epoch in range(2)]
    for epoch in range(2):
        position[0] = epoch
        assert_equal(list(loader), expected[epoch])
    assert opened == [(0, 0)]
    position[:] = [1, 3]  # a run that returns to a checkpoint
    assert_equal(list(loader), expected[1][3:])
    assert opened == [(0, 0), (1, 3)]
    loader.close()
    assert {*multiprocessing.active_children()} <= {*before}


@fuzz
@given(count=st.integers(2, 23), own=st.integers(1, 4), world=st.integers(1, 2))
def test_validation_ranks_agree_and_repeat_nothing(records, count: int, own: int, world: int) -> None:
    """Each rank has the same number of full batches of `own` samples, or one of what there is."""
    dataset = FirstCaptionDataset(records[:count], build_transform(size=16), TOKENIZER)
    ranks = [list(validation_loader(dataset, own * world, rank, world)) for rank in range(world)]
    size = min(own, count // world)
    assert [[len(batch.keys) for batch in batches] for batches in ranks] == [[size] * (count // world // size)] * world
    keys = [key for batches in ranks for batch in batches for key in batch.keys]
    assert len({*keys}) == len(keys)
    assert all(batch.lengths.eq(3).all() for batches in ranks for batch in batches)  # always the first caption
    if own * world <= count:
        alone = list(validation_loader(dataset, own * world))
        together = [sorted(chain(*(batch.keys for batch in parts))) for parts in zip(*ranks, strict=True)]
        assert together == [sorted(batch.keys) for batch in alone]


def leave_in_an_epoch(batches: list[list[Index]], began: Event) -> None:
    examples = CaptionDataset([Record("r", partial(noise, 0), ("a",))], RandomCrop(16), TOKENIZER, seed=5)
    iterator = iter(training_loader(examples, batches, TOKENIZER.pad_id, num_workers=2))
    next(iterator)
    began.set()
    # As at the exit of a command, which a forked process does not have: PyTorch then waits for no worker that may have
    # ended with its lock.
    torch.utils.data._utils._set_python_exit_flag()
    raise SystemExit(3)  # with the iterator alive, as in the traceback of an error


def test_a_process_that_fails_does_not_wait_for_its_workers():
    context = multiprocessing.get_context("fork")  # as from a command: workers and all end with the process
    began = context.Event()
    process = context.Process(target=leave_in_an_epoch, args=([[Index(0, 0)]] * 50, began))
    process.start()
    process.join(600)
    process.kill()
    assert began.is_set()
    assert process.exitcode == 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", "--shm-size"),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", "fewer workers"),
    ],
)
def test_errors_of_workers(error: str, said: str) -> None:
    with pytest.raises(DataError, match=said), worker_errors():
        raise RuntimeError(error)

"""Images of any shape on their way to the model: sizes as timm's, padding, and batches of a budget of patches that are
the same on any number of ranks and workers and after a resume.
"""

import random
from functools import partial
from itertools import chain

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import naflex_transforms
from torch._dynamo.utils import counters

from coca_lit.data.batch import Batch
from coca_lit.data.datamodule import RecordsDataModule
from coca_lit.data.examples import CaptionDataset
from coca_lit.data.loader import Schedule, ShuffledBatches
from coca_lit.data.records import Record
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.shard import Shard
from coca_lit.data.shards.windows import WindowedBatches, Windows
from coca_lit.data.transforms import build_transform, random_box
from coca_lit.errors import DataError
from coca_lit.evals.inference import caption_images, embed_images, image_batches, log_likelihoods
from coca_lit.lit_module import CoCaLit
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, create_model
from coca_lit.models.inputs import largest_shape, preprocessing, stack_images
from coca_lit.projects.naflex.batches import PatchSchedule
from coca_lit.projects.naflex.inputs import AnyShape, Patches, patch_grid
from coca_lit.tokenizer import WordTokenizer
from coca_lit.tools.plan.trace import trace
from coca_lit.training.optim import AdamW
from helpers.epochs import check_killed_runs, open_epoch
from helpers.fuzzing import fuzz
from helpers.shards import write_shards

TOKENIZER = WordTokenizer(["a", "b", "c", "dog"])
CAPTIONS = ("a", "a b", "a b c", "a b c dog")
BUDGETS = (12, 6, 3)


def noise(i: int) -> Image.Image:
    """From wide to tall."""
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (20 + 5 * i, 90 - 3 * i, 3), dtype=np.uint8))


RECORDS = [Record(f"r{i}", partial(noise, i), CAPTIONS) for i in range(23)]


def tiny(**overrides: object) -> CoCa:
    torch.manual_seed(0)
    encoder = {"patch_size": 8, "pos_embed_grid_size": [3, 3], "embed_dim": 24, "depth": 1, "num_heads": 2}
    sizes = {"image_size": 32, "embed_dim": 16, "pooler_queries": 4, "pooler_heads": 2, "text_width": 16}
    sizes |= {"text_layers": 1, "text_heads": 2, "decoder_layers": 1, "context_length": 8}
    tokenizer = {"tokenizer": ["a", "b", "c", "dog"]}
    return create_model("coca2-moderntext-naflex_ViT-B-32", image_encoder_args=encoder, **sizes | tokenizer | overrides)


@pytest.mark.parametrize(
    ("height", "width", "patch_size", "budget", "expected"),
    [
        (480, 640, 32, 64, (224, 288)),
        (427, 640, 16, 256, (208, 304)),
        (224, 224, 32, 64, (256, 256)),
        (100, 800, 32, 64, (96, 672)),
        (1, 5000, 32, 64, (32, 2048)),
        (2, 1, 32, 64, (224, 128)),
    ],
)
def test_sizes_of_images(height: int, width: int, patch_size: int, budget: int, expected: tuple[int, int]) -> None:
    assert patch_grid(height, width, patch_size, budget) == expected


@pytest.mark.parametrize("patches", [1, 2, 7, 12, 36, 48, 100, 240, 256])
def test_the_largest_shape_is_the_nearest_to_a_square_of_all_that_fill_the_patches(patches: int) -> None:
    plain = preprocessing(30, "bicubic", "shortest")
    shape = largest_shape({**plain, "input_kind": AnyShape(16, patches)})
    whole = [(16 * a, 16 * b) for a in range(1, patches + 1) for b in range(a, patches + 1) if a * b == patches]
    assert shape == min(whole, key=lambda sides: sides[1] - sides[0])
    assert largest_shape(plain) == (30, 30)


def test_evaluation_equals_timm() -> None:
    transform = build_transform(input_kind=AnyShape(8, 20))
    for record in RECORDS[::5]:
        patches = transform(record.image())
        resized = naflex_transforms.ResizeToSequence(8, 20)(record.image())
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        rows, coords, valid = naflex_transforms.patchify_image(pixels, (8, 8))
        assert torch.equal(patches.rows, rows)
        assert torch.equal(patches.coords, coords)
        assert torch.equal(patches.valid, valid)
        assert torch.equal(patches.picture(), pixels)
        assert 12 < len(patches) <= 20


def test_training_crops_equal_timm() -> None:
    """The same draws make the same box, in the shape of the image and not of a square."""
    for seed in range(30):
        height, width = 50 + 7 * seed, 400 - 11 * seed
        random.seed(seed)
        box, size, _ = naflex_transforms.RandomResizedCropToSequence.get_params(
            torch.empty(3, height, width), (0.9, 1.0), (3 / 4, 4 / 3), patch_h=8, patch_w=8, max_seq_len=20
        )
        assert random_box(height, width, random.Random(seed), width / height) == box
        patches = AnyShape(8, 64).augmented(torch.zeros(3, height, width, dtype=torch.uint8), random.Random(seed), 20)
        assert tuple(patches.grids * 8) == size
    pixels = torch.randint(0, 256, (3, 16, 48), dtype=torch.uint8)
    assert torch.equal(AnyShape(8, 12).augmented(pixels, random.Random(0), whole=True).picture(), pixels)


def test_a_batch_of_different_shapes() -> None:
    images = [Patches.of(torch.randint(1, 256, (3, h, w), dtype=torch.uint8), 8) for h, w in ((16, 24), (8, 8))]
    batch = stack_images(images)
    assert (batch.rows.shape, batch.grids.tolist()) == ((2, 6, 192), [[2, 3], [1, 1]])
    assert batch.valid.tolist() == [[True] * 6, [True] + [False] * 5]
    assert batch.coords[0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert batch.coords[1].tolist() == [[0, 0]] * 6
    assert torch.equal(batch[1].picture(), images[1].picture())
    assert [len(part) for part in batch.split(1)] == [1, 1]
    assert images[0][None].key_mask() is None
    assert batch.key_mask(prefix=1)[1].flatten().tolist() == [True, True, *[False] * 5]
    assert torch.equal(batch[[1, 0]].rows[1], batch.rows[0])


def test_a_schedule_fills_batches() -> None:
    schedule = PatchSchedule(1000, 4, BUDGETS, seed=1)
    epochs = [[schedule.at(epoch * len(schedule) + step) for step in range(len(schedule))] for epoch in (0, 1)]
    planned = list(chain(*epochs))
    assert {(size, patches) for _, size, patches in planned} == {(4, 12), (8, 6), (16, 3)}
    assert [batch.first for batch in planned[1:]] == [batch.first + batch.size for batch in planned[:-1]]
    assert planned[len(schedule)].first == schedule.samples > 980
    sizes = [[size for _, size, _ in epoch] for epoch in epochs]
    assert sizes[0] != sizes[1]
    assert sorted(sizes[0]) == sorted(sizes[1])
    assert [PatchSchedule(1000, 4, BUDGETS, seed=1).at(i) for i in range(9)] == planned[:9]
    assert [PatchSchedule(1000, 4, BUDGETS, seed=2).at(i) for i in range(9)] != planned[:9]
    assert (len(Schedule(23, 4)), Schedule(23, 4).at(7)) == (5, (28, 4, None))
    uneven = PatchSchedule(100, 4, (11, 4), seed=0)  # three times four patches are more than eleven
    assert {uneven.at(i)[1:] for i in range(len(uneven))} == {(4, 11), (8, 4)}
    with pytest.raises(DataError, match=r"3 samples"):
        PatchSchedule(3, 4, BUDGETS, seed=0)
    with pytest.raises(ValueError, match=r"patches.*\[0\]"):
        PatchSchedule(30, 4, [0], seed=0)


@fuzz
@given(st.data())
def test_a_killed_run_gets_the_same_batches_on_any_ranks(data: st.DataObject) -> None:
    check_killed_runs(52, PatchSchedule(52, 2, (4, 8, 16), seed=3), data)


def contents(batches: list[Batch]) -> list[tuple]:
    """By sample: ranks and workers change its place, never its content."""
    return [
        {key: (image.picture().tolist(), tokens[:length].tolist()) for key, image, tokens, length in rows}
        for rows in (zip(b.keys, b.images, b.tokens, b.lengths.tolist(), strict=True) for b in batches)
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_of_records_do_not_depend_on_ranks_workers_or_resuming() -> None:
    dataset = CaptionDataset(RECORDS, AnyShape(8, 99).augmented, TOKENIZER, seed=5)
    open_at = partial(open_epoch, dataset, 2, 3, schedule=PatchSchedule(len(RECORDS), 2, BUDGETS, seed=5))
    whole = contents(list(open_at()))
    assert {len(batch) for batch in whole} == {2, 4, 8}
    for batch in open_at():
        assert batch.images.counts.max() <= 24 // len(batch.images)
    assert contents(list(open_at(num_workers=2))) == whole
    assert contents(list(open_at(start=2))) == whole[2:]
    halves = [contents(list(open_at(rank=rank, world=2))) for rank in range(2)]
    assert [first | second for first, second in zip(*halves, strict=True)] == whole


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    return [Shard(str(path)) for path in write_shards(tmp_path_factory.mktemp("shards"), 4, 10)]


def test_batches_of_shards(shards: list[Shard]) -> None:
    """The same on any number of ranks, and after a resume."""
    data = LAIONDataModule([shard.name for shard in shards], None, tokenizer=TOKENIZER, batch_size=2, patches=BUDGETS)
    schedule, sources = data.schedule(40), data.sources
    assert data.steps_per_epoch == len(schedule)
    whole = list(ShuffledBatches(sources, schedule, 0, 0, 12))
    planned = [schedule.at(number) for number in range(12)]
    assert [{(len(batch), patches) for _, _, patches in batch} for batch in whole] == [
        {(size, patches)} for _, size, patches in planned
    ]
    halves = [list(ShuffledBatches(sources, schedule, 0, 0, 12, rank, 2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in whole]
    assert list(ShuffledBatches(sources, schedule, 0, 5, 12)) == whole[5:]
    seen = [i for batch in whole for _, i, _ in batch]
    assert len(set(seen[:40])) == 40

    windows = partial(WindowedBatches, sources, schedule, 0, windows=Windows(12, 1e6, 2))
    whole = list(windows(0, 12))
    assert [(len(batch), *{patches for _, _, patches in batch}) for batch in whole] == [
        (size, patches) for _, size, patches in planned
    ]
    assert [a + b for a, b in zip(windows(0, 12, 0, 2), windows(0, 12, 1, 2), strict=True)] == whole
    assert list(windows(5, 12)) == whole[5:]


@pytest.mark.slow
def test_a_run_trains_and_scores() -> None:
    """Lightning's loop, micro-batches and validation; then everything that evaluations ask of a model."""
    net = tiny()
    data = RecordsDataModule(
        {"train": RECORDS, "val": RECORDS[:4]}, tokenizer=net.tokenizer, batch_size=2, image_size=32, patches=BUDGETS
    )
    module = CoCaLit(net, AdamW(lr=1e-2), micro_batch_size=1)
    before = net.image_encoder.trunk.embeds.proj.weight.clone()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    trainer.fit(module, data)
    assert trainer.global_step == data.steps_per_epoch
    assert trainer.callback_metrics["val/caption_loss"].isfinite()
    assert not torch.equal(net.image_encoder.trunk.embeds.proj.weight, before)
    with pytest.raises(DataError, match=r"data\.patches"):
        RecordsDataModule({}, tokenizer=net.tokenizer, batch_size=2, patches=BUDGETS).train_transform()

    net.eval()
    sizes = [tuple(len(part) for part in batch) for batch in image_batches(net, RECORDS[:5], 3, 0)]
    assert sizes == [(3, 3), (2, 2)]
    features = embed_images(net, RECORDS[:5], batch_size=3)
    alone = torch.cat([embed_images(net, [record]) for record in RECORDS[:5]])
    torch.testing.assert_close(features, alone, atol=1e-5, rtol=0)
    captions = caption_images(net, RECORDS[:5], batch_size=5, options={"max_length": 5})
    assert captions == {r.id: caption_images(net, [r], options={"max_length": 5})[r.id] for r in RECORDS[:5]}
    scores = log_likelihoods(net, RECORDS[:3], ["a b", "dog"], lambda i: [0, 1][: 1 + i % 2])
    torch.testing.assert_close(scores[1], log_likelihoods(net, RECORDS[1:2], ["a b", "dog"], lambda i: [0, 1])[0])


def test_words_have_maps_over_a_grid_of_any_shape() -> None:
    samples = pytest.importorskip("coca_lit.projects.attention.samples")
    (sample,) = samples.word_map_samples(tiny().eval(), RECORDS[:1], 1, {"max_length": 5})
    assert sample["image"].startswith("data:image")


@pytest.mark.slow
def test_compiled_blocks_give_the_same_and_stop_compiling() -> None:
    """Shapes and padding that were not seen before compile nothing."""
    torch.manual_seed(0)
    plain, model = tiny().train(), tiny().train()
    model.compile_blocks("eager")
    graphs = []
    for shapes in (
        *([(24, 8), (8, 8), (16, 16)], [(24, 16), (24, 16), (8, 48)]),  # with padding, without
        *([(32, 24), (8, 16), (8, 8)], [(32, 16), (8, 64), (16, 32)]),
        *([(40, 16), (8, 8), (16, 24)], [(8, 40), (40, 8), (8, 40)]),
    ):
        images = stack_images([Patches.of(torch.randint(0, 256, (3, *s), dtype=torch.uint8), 8) for s in shapes])
        tokens, found = TOKENIZER(["a b", "dog", "c a b"]), []
        for net in (plain, model):
            net.zero_grad()
            torch.stack([*loss_terms(net(images, tokens)).values()]).sum().backward()
            found.append([p.grad for p in net.parameters() if p.grad is not None])
        assert len(found[0]) > 40
        torch.testing.assert_close(*found, rtol=1e-3, atol=5e-5)  # sums of fp32 in another order
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[4:] == [graphs[4]] * 2


@pytest.mark.slow
def test_a_plan_counts_full_images() -> None:
    with torch.device("meta"):
        net = tiny()
    flops = trace(net, {"contrastive": 1.0, "caption": 1.0}, 6, None, batch=2).forward["image encoder"]
    width, tokens = 24, 16 + 4
    products = 16 * 192 * width + tokens * (4 + 8) * width * width + 2 * tokens * tokens * width
    assert flops == 2 * 2 * products

"""Cached image tokens against the encoder itself, file by file and in whole runs."""

import errno
import importlib
import os
import pickle
import random
import signal
from collections.abc import Callable
from contextlib import nullcontext
from email.message import Message
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from coca_lit.callbacks import ScoreDuringTraining
from coca_lit.cli import assembly
from coca_lit.cli.assembly import build
from coca_lit.cli.module import build_module
from coca_lit.data.datamodule import RecordsDataModule
from coca_lit.data.examples import CaptionDataset, Index
from coca_lit.data.feature_cache import (
    CachedCaptionDataset,
    CachedFirstCaptionDataset,
    FeatureCache,
    mirrored,
    read_features,
    swap_sides,
    view_numbers,
)
from coca_lit.data.records import Record
from coca_lit.data.transforms import RandomCrop, build_transform
from coca_lit.distributed import rank
from coca_lit.errors import DataError
from coca_lit.evals import Evaluation, Settings
from coca_lit.models import create_model
from coca_lit.models.presets import VOCABULARIES
from coca_lit.tokenizer import WordTokenizer
from coca_lit.training.suitability import check_images
from helpers.running import compose, logged, run

SIZE, COUNT = 16, 5
TOKENIZER = WordTokenizer(VOCABULARIES["scenes"])
CPU = torch.device("cpu")


class Encoder(nn.Module):
    """Pixels (B, 3, 16, 16) -> tokens (B, 4, 6), and how often it was asked."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(3, 6, 8, 8).requires_grad_(False)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.convolution(images.float() / 255).flatten(2).transpose(1, 2)


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def broken() -> Image.Image:
    raise DataError("it is torn")


def records(count: int = COUNT) -> list[Record]:
    return [Record(i, partial(noise, i), ("a red circle left of a blue square",)) for i in range(count)]


def views(folder: Path, encoder: nn.Module, size: int = SIZE) -> FeatureCache:
    return FeatureCache(folder, encoder, build_transform(size=size), RandomCrop(size), seed=3)


def test_views_are_what_the_encoder_gives_for_image_mirror_image_and_crops(tmp_path: Path) -> None:
    encoder = Encoder()
    paths = views(tmp_path, encoder).encode(records(), 4, 0, CPU)
    for i, record in enumerate(records()):
        pixels = build_transform(size=SIZE)(record.image())
        for path, image in zip(paths, (pixels, pixels.flip(-1)), strict=False):
            expected = encoder(image[None])[0]
            torch.testing.assert_close(read_features(path, i).float(), expected, atol=2e-3, rtol=0)
    assert len({path.read_bytes() for path in paths}) == 4


def test_views_are_encoded_once_for_the_same_encoder_images_and_settings(tmp_path: Path) -> None:
    first = views(tmp_path, Encoder()).encode(records(), 1, 0, CPU)
    again = Encoder()
    assert views(tmp_path, again).encode(records(), 1, 0, CPU) == first
    assert again.calls == 0
    assert views(tmp_path, again).encode(records(), 2, 0, CPU)[0] == first[0]
    assert again.calls == 1  # one more view
    others = [
        views(tmp_path, Encoder(seed=1)).encode(records(), 1, 0, CPU),
        views(tmp_path, Encoder(), size=32).encode(records(), 1, 0, CPU),
        views(tmp_path, Encoder()).encode(records(4), 1, 0, CPU),
    ]
    assert len({path for paths in (first, *others) for path in paths}) == 4


def test_arguments_and_code_from_outside_make_another_encoder(tmp_path: Path) -> None:
    """Neither shows in the parts of a module, nor in its tensors."""

    def twice() -> nn.Module:
        class Layered(nn.Identity):
            def forward(self, images: Tensor) -> Tensor:
                return 2 * images

        return Layered()

    def halved() -> nn.Module:
        class Layered(nn.Identity):
            def forward(self, images: Tensor) -> Tensor:
                return images / 2

        return Layered()

    assert repr(twice()) == repr(halved())
    assert views(tmp_path, twice()).folder == views(tmp_path, twice()).folder != views(tmp_path, halved()).folder
    plain, crop = build_transform(size=SIZE), RandomCrop(SIZE)
    folders = [FeatureCache(tmp_path, twice(), plain, crop, 0, arguments={"layer": n}).folder for n in (1, 1, 3)]
    assert folders[0] == folders[1] != folders[2]


def test_code_that_an_encoder_inherits_is_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for factor in (2, 3):
        source = f"from torch import nn\nclass Base(nn.Module):\n    def forward(self, x): return {factor} * x\n"
        (tmp_path / f"base{factor}.py").write_text(source)
        (tmp_path / f"own{factor}.py").write_text(f"from base{factor} import Base\nclass Own(Base): pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        found.append(views(tmp_path, importlib.import_module(f"own{factor}").Own()).folder)
    assert found[0] != found[1]


def test_another_photo_of_the_same_name_is_encoded(tmp_path: Path) -> None:
    photo, found = tmp_path / "photo.png", []
    for seed in (0, 1):
        noise(seed).save(photo)
        os.utime(photo, ns=(seed, seed))
        (path,) = views(tmp_path, Encoder()).encode([Record("photo", photo, "a")], 1, 0, CPU)
        expected = Encoder()(build_transform(size=SIZE)(noise(seed))[None])[0]
        torch.testing.assert_close(read_features(path, 0).float(), expected, atol=2e-3, rtol=0)
        found.append(path)
    assert found[0] != found[1]
    assert views(tmp_path, Encoder()).encode([Record("photo", photo, "a")], 1, 0, CPU) == found[1:]


def test_encoding_that_dies_leaves_no_file(tmp_path: Path) -> None:
    encoder = Encoder()
    encoder.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        views(tmp_path, encoder).encode(records(), 2, 0, CPU)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_image_that_cannot_be_decoded_is_replaced(tmp_path: Path) -> None:
    images = [*records(200), Record("torn.jpg", broken, ("a green square",))]
    paths = views(tmp_path, Encoder()).encode(images, 2, 0, CPU)
    example = CachedCaptionDataset(images, paths, TOKENIZER)[Index(0, 200)]
    assert example.key != "torn.jpg"
    assert [bad.reason for bad in example.bad] == ["unreadable image"]
    with pytest.raises(DataError, match=r"^torn\.jpg: image 200"):
        CachedFirstCaptionDataset(images, paths[0], TOKENIZER)[200]


def locked() -> Image.Image:
    raise DataError("locked.jpg is not a readable image") from PermissionError(errno.EACCES, "Permission denied")


def fetched() -> Image.Image:
    raise URLError("timed out")


def absent() -> Image.Image:
    return Image.open("absent.jpg")


def gone() -> Image.Image:
    raise HTTPError("https://example.com/gone.jpg", 404, "Not Found", Message(), None)


@pytest.mark.parametrize("image", [locked, fetched, absent])
def test_an_image_that_another_attempt_may_read_is_not_kept_as_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, image: Callable[[], Image.Image]
) -> None:
    with pytest.raises(DataError, match=r"^once\.jpg: .*(not a readable image|timed out|No such file)"):
        views(tmp_path, Encoder()).encode([*records(), Record("once.jpg", image, ("a",))], 1, 0, CPU)
    assert not [*tmp_path.rglob("*.npy")]
    views(tmp_path, Encoder()).encode([*records(), Record("torn.jpg", broken, ("a",))], 2, 0, CPU)
    assert caplog.text.count("torn.jpg is left out of training: it is torn") == 1
    views(tmp_path, Encoder()).encode([*records(), Record("gone.jpg", gone, ("a",))], 2, 0, CPU)
    assert caplog.text.count("gone.jpg is left out of training") == 1


def test_a_spawned_worker_gets_no_encoder(tmp_path: Path) -> None:
    """It may be on a GPU, whose memory macOS and Windows do not share."""
    cache = views(tmp_path, Encoder())
    cache.precision = lambda: nullcontext()  # cannot be pickled
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.encoder is None
    assert len(copy._read(0, records())) == len(records())


def test_images_to_score_must_be_whole_and_a_users_function_may_raise_what_pillow_does(tmp_path: Path) -> None:
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 20).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-400])
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 20).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:100] + bytes(len(content) - 100))
    chunks = [*records(200), Record("x", partial(Image.open, tmp_path / "cut.png"), ("a",))]
    assert CaptionDataset(chunks, RandomCrop(SIZE), TOKENIZER)[Index(0, 200)].bad
    opened = partial(Image.open, tmp_path / "cut.jpg")  # which decodes later
    images = [*records(200), Record("cut.jpg", opened, ("a",))]
    check_images(records(20) + images[-1:], SIZE)
    for broken_one in (images, [*records(), Record("torn.jpg", broken, ("a",))]):
        with pytest.raises(DataError, match=r"^(cut\.jpg: image file is truncated.*|torn\.jpg: it is torn)$"):
            views(tmp_path, Encoder()).encode(broken_one, 1, 0, CPU, trained=False)
    assert not [*tmp_path.rglob("*.npy")]
    example = CachedCaptionDataset(images, views(tmp_path, Encoder()).encode(images, 2, 0, CPU), TOKENIZER)[
        Index(0, 200)
    ]
    assert [bad.reason for bad in example.bad] == ["unreadable image"]


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split is empty"):
        views(tmp_path, Encoder()).encode([], 1, 0, CPU)


def ignores_signals() -> Image.Image:
    kept = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    return Image.new("RGB", (SIZE, SIZE), "white" if kept else "black")


def test_workers_outlive_the_signals_of_a_scheduler(tmp_path: Path) -> None:
    (path,) = views(tmp_path, Encoder()).encode([Record(0, ignores_signals, "a")], 1, 1, CPU)
    white = build_transform(size=SIZE)(Image.new("RGB", (SIZE, SIZE), "white"))
    torch.testing.assert_close(read_features(path, 0).float(), Encoder()(white[None])[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("text", "mirror"),
    [
        ("a dog on the left side", "a dog on the right side"),
        ("his left hand, Left of it", "his right hand, right of it"),
        ("from left to right", "from right to left"),
        ("left", "right"),
        ("the leftmost dog, a Right-hand turn", "the rightmost dog, a left-hand turn"),
        ("looking leftwards, the right-most one", "looking rightwards, the left-most one"),
        ("two dogs on the left and right", "two dogs on the right and left"),
        ("one on the left-to-right path, one to the left", "one on the right-to-left path, one to the right"),
        ("a man who left his bike", "a man who left his bike"),
        ("he left the room right behind her", "he left the room right behind her"),
    ],
)
def test_sides_are_swapped_in_phrases_of_places(text: str, mirror: str) -> None:
    assert swap_sides(text) == mirror


@pytest.mark.parametrize(
    ("question", "texts", "mirrored"),
    [
        ("Auf welcher Seite ist die Katze?", ("links", "rechts"), False),
        ("", ("一只棕色的狗在左边奔跑",), False),  # nobody knows the words of other languages for left and right
        ("", ("左側の犬、右側の猫",), False),
        ("", ("Ein Hund links neben dem Auto",), False),
        ("on which side is the cat?", ("left", "right"), True),
        ("", ("turn left", "stop"), False),
        ("", ("golden retriever", "beagle"), True),
    ],
)
def test_answers_and_labels_that_name_a_side(question: str, texts: tuple[str, ...], mirrored: bool) -> None:
    some = [Record(i, partial(noise, i), texts[i % len(texts)], question=question) for i in range(60)]
    assert view_numbers(some, 4) == (range(4) if mirrored else range(0, 8, 2))


def test_without_mirror_images_captions_stay(tmp_path: Path) -> None:
    german = [record._replace(captions=("Ein Hund links neben dem Auto",)) for record in records()]
    plain = views(tmp_path, Encoder()).encode(records(), 1, 0, CPU)
    paths = views(tmp_path, Encoder()).encode(german, 3, 0, CPU)
    assert [path.stem[-2:] for path in paths] == ["_0", "_2", "_4"]
    assert paths[0] == plain[0]
    dataset = CachedCaptionDataset(german, paths, TOKENIZER)
    asked = [record._replace(captions=("ja",), question="ist der Hund links neben dem Ball") for record in german]
    assert [path.stem[-2:] for path in views(tmp_path, Encoder()).encode(asked, 2, 0, CPU)] == ["_0", "_2"]
    assert all(dataset.image(Index(0, 1), german[1], random.Random(i))[1] is german[1] for i in range(9))


@pytest.mark.parametrize("caption", ["LEFT a dog and right the cat", "a man (left) with the dog", "it looks right"])
def test_a_caption_with_an_unclear_side_gets_no_mirror_image(tmp_path: Path, caption: str) -> None:
    some = records()
    some[1] = some[1]._replace(captions=(caption,))
    data = CachedCaptionDataset(some, views(tmp_path, Encoder()).encode(some, 4, 0, CPU), TOKENIZER)
    assert len(data.views) == 4

    def seen(i: int) -> set[int]:
        features = [data.image(Index(0, i), some[i], random.Random(seed))[0] for seed in range(40)]
        return {v for v, path in enumerate(data.views) for f in features if torch.equal(f, read_features(path, i))}

    assert seen(0) == {0, 1, 2, 3}
    assert seen(1) == {0, 2}


def test_mirror_images_have_mirrored_captions(tmp_path: Path) -> None:
    record = Record(0, partial(noise, 0), "Left of the right one, not leftover", question="what is on the left")
    assert mirrored(record)[2:5] == (("right of the left one, not leftover",), None, "what is on the right")
    paths = views(tmp_path, Encoder()).encode(records(), 2, 0, CPU)
    data = CachedCaptionDataset(records(), paths, TOKENIZER)
    seen = set()
    for epoch in range(8):
        for i in range(COUNT):
            example = data[Index(epoch, i)]
            view = next(v for v, path in enumerate(paths) if torch.equal(example.image, read_features(path, i)))
            side = TOKENIZER.decode(example.tokens).split()[3]
            seen.add((view, side))
    assert seen == {(0, "left"), (1, "right")}


def written_by(folder: Path) -> tuple[list[Path], int]:
    encoder = Encoder()
    return views(folder, encoder).encode(records(), 3, 0, CPU), encoder.calls


def fails_on_one(folder: Path) -> str:
    target = folder if rank() == 0 else folder / "file" / "folder"
    if rank() == 1:
        (folder / "file").write_text("in the way")
    try:
        views(target, Encoder()).encode(records(), 2, 0, CPU)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_views_are_dealt_out_to_ranks(on_ranks, tmp_path: Path) -> None:
    paths, _ = written_by(tmp_path / "one")
    results = on_ranks(2, written_by, tmp_path / "two")
    assert [calls for _, calls in results] == [2, 1]
    for path, own in zip(paths, results[1][0], strict=True):
        assert path.read_bytes() == own.read_bytes()
    assert all("cannot write" in said for said in on_ranks(2, fails_on_one, tmp_path))


def test_a_broken_image_to_validate_on_is_named_before_the_first_step(tmp_path: Path) -> None:
    net = create_model("coca_tiny")
    net.freeze("image_encoder")
    images = {"train": [*records(200), Record("torn.jpg", broken, ("a",))], "val": [*records()]}
    sizes = {"batch_size": 2, "image_size": 32, "cached_augmentations": 1, "cache_dir": str(tmp_path)}
    plugin = SimpleNamespace(forward_context=nullcontext, precision="32")
    for damaged in (False, True):
        images["val"] += images["train"][-1:] if damaged else []
        data = RecordsDataModule(images, tokenizer=net.tokenizer, **sizes)
        data.trainer = SimpleNamespace(
            lightning_module=SimpleNamespace(net=net),
            precision_plugin=plugin,
            strategy=SimpleNamespace(root_device=CPU),
        )
        with pytest.raises(DataError, match=r"^torn\.jpg: it is torn") if damaged else nullcontext():
            data.setup("fit")


# Runs: scenes are never cropped, so one view is exactly what is trained on without a cache

SHORT = (
    *("trainer=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "data.train_count=24", "data.batch_size=8"),
    *("model.warmup_steps=2", "evals=[]", "model.freeze=[image_encoder]", "trainer.limit_val_batches=1"),
    *("+model.net.text_layers=1", "+model.net.decoder_layers=1"),
)


@pytest.mark.parametrize("frozen", ["image_encoder", "image_encoder.trunk.*1,image_encoder.trunk.layer2"])
@pytest.mark.slow
def test_a_cached_run_trains_as_one_that_encodes(frozen: str, tmp_path: Path) -> None:
    """All of the encoder is frozen, or the convolution and norm at its beginning and two of its four layers."""
    cache = (f"data.cache_dir={tmp_path}/views", f"model.freeze=[{frozen}]")
    for name, views in (("plain", 0), ("cached", 1)):
        run(tmp_path / name, *SHORT, f"data.cached_augmentations={views}", *cache)
    plain, cached = logged(tmp_path / "plain", "_loss"), logged(tmp_path / "cached", "_loss")
    assert len(plain["train/caption_loss"]) == 6
    assert plain.keys() == cached.keys() >= {"val/contrastive_loss", "val/caption_loss"}
    for name, values in plain.items():
        assert cached[name] == pytest.approx(values, rel=5e-3)
        assert cached[name] != values


@pytest.mark.slow
def test_a_resumed_run_encodes_with_the_encoder_of_its_checkpoint(tmp_path: Path) -> None:
    """Not with the random one that it is built with: a view that has been lost comes back as it was."""
    torch.manual_seed(1)  # other weights than those of the run's seed
    torch.save(create_model("coca_tiny").image_encoder.trunk.state_dict(), tmp_path / "encoder.pt")
    words = (
        *SHORT,
        f"init_parts.image_encoder={tmp_path}/encoder.pt",
        f"data.cache_dir={tmp_path}/views",
        "data.cached_augmentations=1",
    )
    run(tmp_path / "run", *words, "trainer.max_epochs=1")
    views = {path: path.read_bytes() for path in tmp_path.glob("views/*/*.npy")}
    for path in views:
        path.unlink()
    run(tmp_path / "run", *words, "trainer.max_epochs=2")
    assert {path: path.read_bytes() for path in tmp_path.glob("views/*/*.npy")} == views


def test_the_network_is_as_before_and_scored_on_pixels(tmp_path: Path) -> None:
    class Look(Evaluation):
        def scores(self, model, records, settings):
            return {"width": model.image_encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[2]}

    cfg = compose(*SHORT, f"output_dir={tmp_path}", "data.cached_augmentations=1", f"data.cache_dir={tmp_path}/views")
    module = build_module(cfg)
    before = {name: tensor.clone() for name, tensor in module.net.image_encoder.state_dict().items()}
    scoring = ScoreDuringTraining([Look("look", [Record("unseen", "1.png")])], Settings(tmp_path))
    data = build(cfg.data, "data", tokenizer=module.net.tokenizer)
    assembly.build_trainer(cfg, scoring).fit(module, datamodule=data)
    assert scoring.found.scores == {"look/width": module.net.image_encoder.width}
    torch.testing.assert_close(module.net.image_encoder.state_dict(), before, rtol=0, atol=0)

"""`data.decode`: JPEGs decoded at a fraction of their size, or on the device, against JPEGs decoded whole."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from coca_lit.data import encoded_images as encoder
from coca_lit.data.any_shape import CropToPatches
from coca_lit.data.batch import Batch
from coca_lit.data.encoded_images import CropOfEncoded, check_decoder
from coca_lit.data.pixels import decode_pixels
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.transforms import RandomCrop, as_tensor, whole_box
from coca_lit.errors import DataError
from coca_lit.tokenizer import WordTokenizer
from helpers.shards import write_tar

CPU = torch.device("cpu")


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth: no wave is shorter than a fifth of the shorter side."""
    down, across = np.mgrid[0:height, 0:width] / min(height, width)
    phases = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = [np.sin(20 * down + phase) + np.cos(25 * across - 9 * down + phase) for phase in phases]
    return (127.5 + 50 * np.stack(waves, axis=-1)).astype(np.uint8)


def encoded(pixels: np.ndarray, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def undecodable(jpeg: bytes) -> bytes:
    """The JPEG with a whole header but without its quantisation tables."""
    kept, at = jpeg[:2], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        kept, at = kept + (b"" if jpeg[at + 1] == 0xDB else jpeg[at:end]), end
    return kept + jpeg[at:]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """(height, width) of what was resized."""
    found: list[tuple[int, ...]] = []

    def watched(pixels: Tensor, *args) -> Tensor:
        found.append(tuple(pixels.shape[1:]))
        return resized(pixels, *args)

    resized = encoder.resized
    monkeypatch.setattr(encoder, "resized", watched)
    return found


@pytest.mark.parametrize("shape", [(2000, 2600), (2501, 2003)])
def test_reduced_crops_are_those_of_whole_photos(decoded, shape):
    content = encoded(photo(*shape), quality=92)
    for seed in range(3):
        reduced = CropOfEncoded(224, "reduced")(content, "", random.Random(seed))
        expected = RandomCrop(224)(as_tensor(decode_pixels(content, "")), random.Random(seed))
        assert (reduced.int() - expected.int()).abs().max() <= 2
    assert decoded == [(-(-shape[0] // 2), -(-shape[1] // 2))] * 3


@pytest.mark.parametrize(("side", "fraction"), [(127, 1), (128, 2), (511, 4), (2048, 8)])
def test_reduced_photos_keep_four_times_the_wanted_pixels(decoded, monkeypatch, side, fraction):
    monkeypatch.setattr(encoder, "random_box", whole_box)
    CropOfEncoded(16, "reduced")(encoded(photo(side, side + 100)), "", random.Random(0))
    assert decoded == [(-(-side // fraction), -(-(side + 100) // fraction))]


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_small_and_other_images_are_not_reduced(form):
    content = encoded(photo(300, 400), form)
    reduced = CropOfEncoded(64, "reduced")(content, "", random.Random(0))
    assert torch.equal(reduced, RandomCrop(64)(as_tensor(decode_pixels(content, "")), random.Random(0)))


def shards(folder: Path, images: list[tuple[str, bytes]], within: str = "") -> str:
    files = {}
    for number, (suffix, content) in enumerate(images):
        key = f"{within}{number:04d}"
        files |= {f"{key}.{suffix}": content, f"{key}.txt": b"a dog" + b" number" * (number % 3)}
    return str(write_tar(folder / "0.tar", files))


def batches(pattern: str, decode: str, cache: Path, samples: int | None = None, **more) -> list[Batch]:
    options = {"tokenizer": WordTokenizer(["a", "dog", "number"]), "batch_size": 4, "image_size": 32, **more}
    data = LAIONDataModule(pattern, samples, decode=decode, cache_dir=str(cache), **options)
    return [batch.to(CPU) for batch in data.train_dataloader()]


@pytest.mark.parametrize("more", [{}, {"num_workers": 1}])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_device_makes_the_crops_of_workers(tmp_path, more):
    images = [("jpg", encoded(photo(60 + n, 90 - n, n), quality=80 + n)) for n in range(9)]
    images += [("png", encoded(photo(60, 90), "PNG")), ("jpg", encoded(photo(60, 90)[..., 0]))]
    images += [("jpg", images[0][1] + bytes(3))]  # bytes after the end marker: left to the worker
    pattern = shards(tmp_path, images)
    whole, device = (batches(pattern, decode, tmp_path, **more) for decode in ("full", "device"))
    assert len(whole) == 3
    for a, b in zip(whole, device, strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.tokens, b.tokens)
        assert b.images.shape == (4, 3, 32, 32)
        assert (a.images.int() - b.images.int()).abs().max() <= 2


def test_workers_leave_jpegs_encoded(tmp_path):
    images = [("jpg", encoded(photo(60, 90, n))) for n in range(3)] + [("png", encoded(photo(60, 90), "PNG"))]
    options = {"tokenizer": WordTokenizer(["a"]), "batch_size": 4, "image_size": 32, "cache_dir": str(tmp_path)}
    (batch,) = LAIONDataModule(shards(tmp_path, images), None, decode="device", **options).train_dataloader()
    assert batch.images.shape == (1, 3, 32, 32)
    assert sorted(batch.encoded.sizes) == sorted(len(content) for _, content in images[:3])


@pytest.mark.parametrize("within", ["", "./", "a/b/"])
def test_a_jpeg_that_the_device_cannot_decode_is_replaced_and_reported(tmp_path, within):
    images = [encoded(photo(60, 90, n)) for n in range(4)]
    images[2] = undecodable(images[2])
    simplejpeg.decode_jpeg_header(images[2])  # workers see nothing wrong
    pattern = shards(tmp_path, [("jpg", image) for image in images], within)
    (batch,) = batches(pattern, "device", tmp_path)
    ((shard, key, reason, detail),) = batch.bad
    assert (shard, key, reason) == (pattern, f"{within}0002", "unreadable image")
    assert "uantization table" in detail
    names = [Path(key).name for key in batch.keys]
    assert sorted({*names}) == ["0000", "0001", "0003"]
    (twice,) = {name for name in names if names.count(name) == 2}
    a, b = (place for place, name in enumerate(names) if name == twice)
    assert torch.equal(batch.images[a], batch.images[b])
    assert torch.equal(batch.tokens[a], batch.tokens[b])
    with pytest.raises(DataError, match=r"Quantization table.*data\.decode=full"):
        batches(shards(tmp_path, [("jpg", images[2])] * 4), "device", tmp_path)


@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.skipif(torch.version.cuda is not None, reason="for a build without CUDA")
def test_a_torchvision_that_cannot_decode_there_is_refused(device):
    check_decoder(CPU)
    with pytest.raises(DataError, match=rf"{device}.*data\.decode=full"):
        check_decoder(torch.device(device))


def test_a_device_other_than_the_cpu_gets_the_same_crops():
    """Other devices resize floats. A tensor on the CPU that claims another device takes the same path."""
    pixels = as_tensor(decode_pixels(encoded(photo(300, 400), quality=95), ""))
    box = encoder.random_box(300, 400, random.Random(0))
    expected = encoder.resized(pixels, box, (64, 64))

    class Elsewhere(Tensor):
        device = torch.device("meta")

    found = encoder.resized(pixels.as_subclass(Elsewhere), box, (64, 64))
    assert found.dtype == torch.uint8
    assert (found.as_subclass(Tensor).int() - expected.int()).abs().max() <= 2


def test_a_key_that_cannot_be_served_is_refused(tmp_path):
    pattern = shards(tmp_path, [("jpg", encoded(photo(60, 90, n))) for n in range(4)])
    with pytest.raises(ValueError, match=r"decode.*'half'"):
        batches(pattern, "half", tmp_path)
    data = LAIONDataModule(pattern, None, decode="reduced", tokenizer=WordTokenizer(["a"]), batch_size=4)
    data.train_transform = lambda: CropToPatches(16, 64)
    with pytest.raises(DataError, match=r"data\.decode=reduced"):
        data.train_dataloader()

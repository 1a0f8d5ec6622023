"""From img2dataset shards to training batches: our loader and OpenCLIP's webdataset pipeline, part by part.

    OMP_NUM_THREADS=1 python experiments/benchmarks/input_pipeline.py
    OMP_NUM_THREADS=1 python experiments/benchmarks/input_pipeline.py --photos FOLDER

Both read the same shards in one process and make batches of crops (RandomResizedCrop 0.9-1.0 to 224) and tokens; theirs
are normalised floats, ours uint8, normalised on the device. The run stops if our pixels differ from OpenCLIP's
transform, given the same crop boxes, by more than 2 of 255.
"""

import argparse
import io
import json
import random
import tarfile
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import open_clip_train.data
import simplejpeg
import torch
import webdataset as wds
from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, image_transform
from PIL import Image

from coca_lit.data.batch import Example, collate
from coca_lit.data.pixels import decode_pixels
from coca_lit.data.shards.index import tar_indexes
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.shards.listing import find_shards
from coca_lit.data.shards.sample import Pair, pair_of
from coca_lit.data.sources import as_tensor
from coca_lit.data.transforms import Box, RandomCrop, random_box, resized
from coca_lit.tokenizer import get_tokenizer
from experiments.benchmarks.harness import interleaved, ratio
from experiments.benchmarks.record import record

# webdataset 1.0 marks the end of a shard by an empty sample, of which OpenCLIP 3.3 does not know.
open_clip_train.data.tar_file_expander = partial(wds.tariterators.tar_file_expander, eof_value=None)

CSV = Path(__file__).with_suffix(".csv")
SIZE, BATCH, SHARDS, TOLERANCE = 224, 64, 4, 2
PHOTOS = 24  # of each size
ASPECTS = ((4, 3), (3, 4), (3, 2), (1, 1))
TEXT = "a two brown white dogs children run play on the grass beach near water with red ball while people watch"


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the input pipeline, ours and OpenCLIP's.")
    parser.add_argument("--photos", type=Path, help="folder with .jpg files; without it synthetic photos are made")
    parser.add_argument("--count", type=int, default=512, help=f"samples of a repetition, a multiple of {BATCH}")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    case = f"photos in {args.photos.name}" if args.photos else "synthetic photos, short side 256-512"
    with tempfile.TemporaryDirectory() as folder:
        images = photos(args.photos, args.count) if args.photos else map(synthetic_photo, range(args.count))
        write_shards(Path(folder), list(images))
        samples = read_indexed(folder)
        difference = check_pixels(samples)
        for row in [*whole(folder, args), *parts(folder, samples, args.repetitions)]:
            record(CSV, [{"case": case, **row, "largest difference": difference}])
    for row in sizes(args.repetitions) if not args.photos else ():
        record(CSV, [{"case": "decode, crop and resize synthetic photos", **row}])
    for row in fractions(args.repetitions) if not args.photos else ():
        record(CSV, [{"case": "decode synthetic photos at a fraction of their size", **row}])


def whole(folder: str, args: Namespace) -> Iterator[dict[str, object]]:
    """Shards to batches; the target is for local shards, which are indexed. Tokenizers are made before."""
    our_tokenizer, their_tokenizer = get_tokenizer("clip"), open_clip.get_tokenizer("coca_ViT-B-32")

    def ours() -> None:
        data = LAIONDataModule(
            f"{folder}/*.tar",
            args.count,
            cache_dir=folder,
            tokenizer=our_tokenizer,
            batch_size=BATCH,
            image_size=SIZE,
        )
        assert sum(len(batch.images) for batch in data.train_dataloader()) == args.count

    def theirs() -> None:
        options = {"train_data": f"{folder}/{{0..{SHARDS - 1}}}.tar", "train_num_samples": args.count, "seed": 0}
        sizes = {"batch_size": BATCH, "workers": 0, "world_size": 1, "train_data_upsampling_factors": None}
        loader = open_clip_train.data.get_wds_dataset(
            Namespace(**options, **sizes), image_transform(SIZE, True), is_train=True, tokenizer=their_tokenizer
        ).dataloader
        assert sum(len(images) for images, _ in loader) == args.count

    variants = {"theirs": theirs, "indexed": ours}
    seconds = interleaved(variants, args.repetitions)
    yield {"what": "all, indexed shards", **result(seconds, "indexed", args.count), "target": "at least 3.5"}


def parts(folder: str, samples: Sequence[Pair], repetitions: int) -> Iterator[dict[str, object]]:
    """The same work in stages, each on the output of the stage before."""
    encode, texts = get_tokenizer("clip").encode, [captions["txt"][0] for _, captions in samples]
    their_tokens, their_transform, crop = (
        open_clip.get_tokenizer("coca_ViT-B-32"),
        image_transform(SIZE, True),
        RandomCrop(SIZE),
    )
    pictures, rng = [open_with_pillow(image) for image, _ in samples], random.Random(0)
    decoded = [as_tensor(decode_pixels(image, "it")) for image, _ in samples]
    floats = [their_transform(picture) for picture in pictures[:BATCH]]
    examples = [
        Example(crop(pixels, rng), encode(text), "") for pixels, text in zip(decoded[:BATCH], texts, strict=False)
    ]
    ids, batches = their_tokens(texts[:BATCH]), len(samples) // BATCH

    pieces: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "read": (lambda: [*wds.WebDataset(tar_names(folder), shardshuffle=False)], lambda: read_indexed(folder)),
        "decode": (
            lambda: [open_with_pillow(image) for image, _ in samples],
            lambda: [as_tensor(decode_pixels(image, "it")) for image, _ in samples],
        ),
        "crop and resize": (
            lambda: [their_transform(picture) for picture in pictures],
            lambda: [crop(pixels, rng) for pixels in decoded],
        ),
        "tokenise": (lambda: [their_tokens(text)[0] for text in texts], lambda: [encode(text) for text in texts]),
        "collate": (
            lambda: [(torch.stack(floats), torch.stack([*ids])) for _ in range(batches)],
            lambda: [collate(examples, 0) for _ in range(batches)],
        ),
    }
    for name, (theirs, ours) in pieces.items():
        seconds = interleaved({"theirs": theirs, "ours": ours}, repetitions)
        yield {"what": name, **result(seconds, "ours", len(samples))}


def sizes(repetitions: int) -> Iterator[dict[str, object]]:
    """From encoded photos to crops, by the size in which the photos are stored."""
    transform, crop, rng = image_transform(SIZE, True), RandomCrop(SIZE), random.Random(0)

    def theirs(encoded: Sequence[bytes]) -> list[torch.Tensor]:
        return [transform(open_with_pillow(content)) for content in encoded]

    def ours(encoded: Sequence[bytes]) -> list[torch.Tensor]:
        return [crop(as_tensor(decode_pixels(content, "")), rng) for content in encoded]

    for short in (256, 512, 1024, 2048):
        encoded = [synthetic_photo(seed, short) for seed in range(PHOTOS)]
        seconds = interleaved({"theirs": partial(theirs, encoded), "ours": partial(ours, encoded)}, repetitions)
        yield {"what": f"shorter side {short}", **result(seconds, "ours", PHOTOS)}


def fractions(repetitions: int) -> Iterator[dict[str, object]]:
    """Decoding at a fraction of the size by a smaller DCT, where something is left to resize: time, and what it changes
    in crops. A crop begins and ends where both have a pixel.
    """

    def decode(content: bytes, fraction: int = 1) -> torch.Tensor:
        height, width, *_ = simplejpeg.decode_jpeg_header(content)
        least = (-(-height // fraction), -(-width // fraction))
        pixels = simplejpeg.decode_jpeg(content, "RGB", False, False, *least, fraction)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def decode_all(encoded: Sequence[bytes], fraction: int = 1) -> list[torch.Tensor]:
        return [decode(content, fraction) for content in encoded]

    for short, fraction in ((448, 2), (896, 2), (896, 4), (1792, 2), (1792, 4), (3584, 2), (3584, 4), (3584, 8)):
        encoded, largest = [synthetic_photo(seed, short) for seed in range(PHOTOS // 4)], 0
        for seed, content in enumerate(encoded):
            full, small = decode(content), decode(content, fraction)
            height, width = (side // fraction for side in full.shape[1:])
            box = random_box(height, width, random.Random(seed))
            expected = resized(full, Box(*(fraction * side for side in box)), (SIZE, SIZE)).int()
            largest = max(largest, int((resized(small, box, (SIZE, SIZE)).int() - expected).abs().max()))
        variants = {"full": partial(decode_all, encoded), "reduced": partial(decode_all, encoded, fraction)}
        seconds = interleaved(variants, repetitions)
        times = ratio(seconds["full"], seconds["reduced"])
        yield {"what": f"shorter side {short} at 1/{fraction}", "times the speed": times, "largest difference": largest}


def result(seconds: dict[str, list[float]], ours: str, count: int) -> dict[str, object]:
    times = {"theirs": min(seconds["theirs"]) / count, "ours": min(seconds[ours]) / count}
    rates = {f"{name} samples/s": 1 / time for name, time in times.items()}
    return {"ratio": ratio(seconds["theirs"], seconds[ours]), **{f"{k} µs": 1e6 * t for k, t in times.items()}, **rates}


def check_pixels(samples: Sequence[Pair]) -> int:
    """The largest difference to OpenCLIP's transform, in grey levels; ends the run where it is above the tolerance."""
    theirs, largest = image_transform(SIZE, is_train=True), 0
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    for seed, (image, _) in enumerate(samples):
        pixels, picture = as_tensor(decode_pixels(image, "it")), open_with_pillow(image)
        box = random_box(picture.height, picture.width, random.Random(seed))
        theirs.transforms[0].get_params = lambda *_, box=box: tuple(box)
        expected = ((theirs(picture) * std + mean) * 255).round().int()
        largest = max(largest, int((RandomCrop(SIZE)(pixels, random.Random(seed)).int() - expected).abs().max()))
    if largest > TOLERANCE:
        raise SystemExit(f"our pixels differ from OpenCLIP's by {largest} of 255, more than {TOLERANCE}")
    return largest


def read_indexed(folder: str) -> list[Pair]:
    indexes = tar_indexes(find_shards(tar_names(folder)), Path(folder))
    return [pair_of(index.read(i), ["txt"], index.shard.name) for index in indexes for i in range(len(index))]


def tar_names(folder: str) -> list[str]:
    return [f"{folder}/{number}.tar" for number in range(SHARDS)]


def open_with_pillow(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def photos(folder: Path, count: int) -> list[bytes]:
    found = sorted(folder.rglob("*.jpg"))
    if len(found) < count:
        raise SystemExit(f"{folder} has {len(found)} .jpg files, fewer than {count}: set --count")
    return [path.read_bytes() for path in found[:: len(found) // count][:count]]


def synthetic_photo(seed: int, short: int | None = None) -> bytes:
    """Colour fields at several scales, edges and grain; 4:2:0 at quality 85 to 95. `short`: pixels of the shorter side,
    256 to 512 if it is not given.
    """
    rng = np.random.default_rng(seed)
    drawn, (across, down) = int(rng.integers(256, 513)), ASPECTS[seed % len(ASPECTS)]
    short = short or drawn
    width, height = (round(short * side / min(across, down)) for side in (across, down))
    image = np.full((height, width, 3), 128.0)
    for cells, contrast in ((4, 50), (16, 30), (64, 15)):
        field = Image.fromarray((rng.random((cells, cells, 3)) * 255).astype(np.uint8))
        image += (np.asarray(field.resize((width, height), Image.Resampling.BICUBIC)) / 127.5 - 1) * contrast
    for _ in range(6):
        top, left = int(rng.integers(height // 2)), int(rng.integers(width // 2))
        image[top : top + height // 4, left : left + width // 4] += rng.normal(0, 40, 3)
    image += rng.normal(0, 3, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85 + seed % 11)
    return buffer.getvalue()


def write_shards(folder: Path, images: Sequence[bytes]) -> None:
    """As img2dataset does, with captions of 4 to 20 words."""
    rng = random.Random(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number, image in enumerate(images[shard::SHARDS]):
                caption = " ".join(rng.choices(TEXT.split(), k=rng.randint(4, 20)))
                fields = {"jpg": image, "txt": caption.encode(), "json": json.dumps({"caption": caption}).encode()}
                for suffix, content in fields.items():
                    member = tarfile.TarInfo(f"{shard:05d}{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()

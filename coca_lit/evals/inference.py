"""Running a model over captioned images: captions for scoring, features for retrieval.

Images are dealt out to ranks by stride, never padded, and gathered with their position, so every image counts exactly
once on any number of ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coca_lit.data.prefetch import worker_options
from coca_lit.data.records import Record
from coca_lit.data.sources import Transform
from coca_lit.data.transforms import build_transform, loaded
from coca_lit.distributed import gather_objects, rank, stable_seed, world_size
from coca_lit.models import CoCa, DualEncoder
from coca_lit.models.generation.options import complete
from coca_lit.models.inputs import Images, stack_images
from coca_lit.models.likelihood import ReadTexts, image_keys_values

MEAN_COLOUR = (123, 117, 104)  # of the pixels that OpenAI trained CLIP with


def caption_images(
    model: CoCa,
    records: Sequence[Record],
    batch_size: int = 64,
    num_workers: int = 0,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> dict[int | str, str]:
    """One generated caption per image, by image id, in the order of the records. Every rank gets all of them.

    `options` are passed to `CoCa.generate`. Captions that are drawn depend on the batches, and so on the number of
    processes.
    """

    def write(part: Sequence[Record], images: Images) -> Iterable[str]:
        return map(model.tokenizer.decode, model.generate(images, **seeded_by(part, options, model.device)))

    return write_texts(model, records, write, batch_size, num_workers)


def seeded_by(records: Sequence[Record], options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The options of `CoCa.generate`, with random numbers of their own for these records where captions are drawn."""
    if complete(options).strategy != "sample" or options.get("generator") is not None:
        return dict(options)
    seed = stable_seed("captions", *(record.id for record in records))
    return {**options, "generator": torch.Generator(device).manual_seed(seed)}


def write_texts(
    model: CoCa,
    records: Sequence[Record],
    write: Callable[[Sequence[Record], Images], Iterable[str]],
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[int | str, str]:
    """What `write` makes of each record and its pixels (B, 3, H, W), a batch at a time: texts by id, in the order of
    the records. Every rank gets all of them.
    """
    written: list[tuple[int, str]] = []
    for positions, images in image_batches(model, records, batch_size, num_workers):
        written += zip(positions, write([records[i] for i in positions], images), strict=True)
    texts = dict(pair for part in gather_objects(written) for pair in part)
    return {record.id: texts[i] for i, record in enumerate(records)}


def embed_pairs(
    model: DualEncoder, records: Sequence[Record], batch_size: int = 64, num_workers: int = 0, prompt: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of all images (I, E) and of all their captions (T, E), with `prompt` before each, and the image of each
    caption (T,); on the CPU of every rank.
    """
    texts = [prompt + caption for record in records for caption in record.captions]
    image_of_text = torch.tensor([i for i, record in enumerate(records) for _ in record.captions])
    images = embed_images(model, records, batch_size, num_workers)
    return images, embed_texts(model, texts, batch_size), image_of_text


def embed_images(model: DualEncoder, records: Sequence[Record], batch_size: int = 64, num_workers: int = 0) -> Tensor:
    """Features of all images (I, E), of unit length, on the CPU of every rank."""

    def compute(_: Sequence[Record], images: Images) -> Tensor:
        return model.encode_image(images)

    return rows_of(model, records, compute, batch_size, num_workers)


def rows_of(
    model: DualEncoder,
    records: Sequence[Record],
    compute: Callable[[Sequence[Record], Images], Tensor],
    batch_size: int = 64,
    num_workers: int = 0,
) -> Tensor:
    """What `compute` makes of records and their pixels, see `image_batches`, (B, E) of a batch and (I, E) of all; on
    the CPU of every rank.
    """
    rows_of_rank = []
    with evaluating(model):
        for positions, images in image_batches(model, records, batch_size, num_workers):
            rows = compute([records[i] for i in positions], images)
            rows_of_rank.append((positions, rows.float().cpu()))
    return _gather_rows(rows_of_rank, len(records))


def embed_texts(model: DualEncoder, texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Features of all texts (T, E), of unit length, on the CPU of every rank."""
    numbers = range(rank(), len(texts), world_size())
    by_length = sorted(numbers, key=lambda i: len(texts[i]))  # less padding, same result
    rows_of_rank = []
    with evaluating(model):
        for start in range(0, len(by_length), batch_size):
            positions = by_length[start : start + batch_size]
            tokens = model.tokenizer.tokens_of([texts[i] for i in positions]).to(model.device)
            rows_of_rank.append((positions, model.encode_text(tokens).float().cpu()))
    return _gather_rows(rows_of_rank, len(texts))


def _gather_rows(rows_of_rank: list[tuple[list[int], Tensor]], count: int) -> Tensor:
    """The rows of all ranks (count, E) in order, from positions and a row for each."""
    parts = [batch for part in gather_objects(rows_of_rank) for batch in part]
    gathered = torch.empty(count, parts[0][1].shape[1])
    for positions, rows in parts:
        gathered[positions] = rows
    return gathered


def log_likelihoods(
    model: CoCa,
    records: Sequence[Record],
    texts: Sequence[str],
    texts_of: Callable[[int], Sequence[int]],
    batch_size: int = 64,
    num_workers: int = 0,
) -> list[Tensor]:
    """log p(text | image) of the texts of each image, in nats, on the CPU of every rank.

    Args:
        texts_of: position of a record -> numbers of the texts that are scored beside its image, one or more.
        batch_size: images that are encoded, and pairs that the decoder reads, at a time.
    """
    tokens = model.tokenizer.tokens_of(texts).to(model.device)  # (T, L)
    of_rank: list[tuple[int, Tensor]] = []
    with evaluating(model):
        read = ReadTexts(model, tokens, batch_size)
        for positions, images in image_batches(model, records, batch_size, num_workers):
            encoded = image_keys_values(model, images)
            wanted = [torch.tensor(texts_of(position)) for position in positions]
            for count, group in groupby(range(len(positions)), key=lambda row: len(wanted[row])):
                alike = list(group)
                at_once = max(batch_size // count, 1)
                for start in range(0, len(alike), at_once):
                    rows = alike[start : start + at_once]
                    numbers = torch.stack([wanted[row] for row in rows])  # (R, K)
                    keys_values = [(keys[rows], values[rows]) for keys, values in encoded]
                    scored = _by_length(read, keys_values, numbers, max(batch_size // len(rows), 1))
                    of_rank += zip([positions[row] for row in rows], scored, strict=True)
    found = dict(pair for part in gather_objects(of_rank) for pair in part)
    return [found[i] for i in range(len(records))]


def _by_length(read: ReadTexts, keys_values: list[tuple[Tensor, Tensor]], numbers: Tensor, at_once: int) -> Tensor:
    """log p(text | image) (R, K) of texts by their numbers (R, K) and of R images, texts of similar lengths at a time:
    less padding, same result.
    """
    by_length = read.lengths[numbers].argsort(dim=1, stable=True)
    parts = numbers.gather(1, by_length).split(at_once, dim=1)
    scored = torch.cat([read.log_likelihoods(keys_values, part).cpu() for part in parts], dim=1)
    return torch.empty_like(scored).scatter(1, by_length, scored)


def blind_log_likelihoods(model: CoCa, texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """log p(text) (T,) as the decoder has it beside an image without content: the mean colour, all zeros after
    normalisation (VisualGPTScore, arXiv 2306.01879, takes noise).
    """
    blank = Record("blank", partial(Image.new, "RGB", (32, 32), MEAN_COLOUR))
    return log_likelihoods(model, [blank], texts, lambda _: range(len(texts)), batch_size)[0]


@contextmanager
def evaluating(model: DualEncoder) -> Iterator[None]:
    """Without gradients, and with the model in evaluation mode, which is reset afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _pixels(transform: Transform, records: Sequence[Record]) -> Images:
    """Of all images of some records, in a worker."""
    return stack_images([loaded(image, transform) for record in records for image in record.images])


def image_batches(
    model: DualEncoder, records: Sequence[Record], batch_size: int, num_workers: int
) -> Iterator[tuple[list[int], Images]]:
    """This rank's positions in `records` and their pixels (B, 3, H, W), or an `Input`, on the model's device; of
    records with n images n · B of them.
    """
    of_rank = range(rank(), len(records), world_size())
    every = cast(Dataset[Record], records)
    parts = [list(of_rank[start : start + batch_size]) for start in range(0, len(of_rank), batch_size)]
    load = partial(_pixels, build_transform(**model.preprocessing))
    loader = DataLoader(every, batch_sampler=parts, collate_fn=load, **worker_options(num_workers))
    for positions, pixels in zip(parts, loader, strict=True):
        yield positions, pixels.to(model.device, non_blocking=model.device.type == "cuda")

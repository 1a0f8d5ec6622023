"""Data that a model cannot learn from as they are, found before the first step: an error where nothing sensible could
come of the run, else a warning. A bounded number of captions and images is looked at.
"""

import filecmp
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from PIL import Image

from coca_lit.data.datamodule import CaptionDataModule
from coca_lit.data.records import ImageFile, Record, drawn
from coca_lit.data.transforms import decoding
from coca_lit.distributed import print_rank_zero
from coca_lit.errors import DataError
from coca_lit.models import CoCa
from coca_lit.models.generation.options import complete
from coca_lit.tokenizer import Tokenizer, unknown_words

CAPTIONS, IMAGES = 1000, 8  # that are looked at
ALIKE = 64  # images that are looked at where the first `IMAGES` are equal: they may be by chance
SOME, MOST = 0.05, 0.25  # share of unknown words or cut captions worth a warning; of unknown words: an error
SPACED = 12  # characters; longer texts should be several words
FAR = 2  # times that the model's input is larger than an image
MAX_TRAINING = 20_000  # training photos up to which contents are compared
MAX_HELD_OUT = 200  # photos held out that are compared with them


def check_data(
    data: CaptionDataModule,
    net: CoCa,
    generate: Mapping[str, Any] = MappingProxyType({}),
    read_captions: bool = True,
    of_pairs: bool = False,
) -> None:
    """Compares the training data with the network that is to learn them.

    Args:
        generate: the options with which captions are generated for scores.
        read_captions: whether a loss reads the captions, which may be labels alone; questions are always read.
        of_pairs: whether a loss takes one text for each image.

    Raises:
        DataError: most words are unknown, all images are equal, or records have several of them and a loss takes one.
    """
    records = data.drawn_records(CAPTIONS)
    if of_pairs and any(record.further for record in records):
        raise DataError(
            "the records have several images, and the losses of pairs take one: set model.contrastive_weight=0 "
            "model.caption_weight=0 and an objective such as model=coca_labels"
        )
    captions = [record.captions[0] for record in records] if read_captions else []
    for texts in (captions, [record.question for record in records if record.question]):
        if texts:
            check_captions(texts, net.tokenizer)
    joined = sum(len(text) > SPACED and len(text.split()) == 1 for text in captions)
    if joined > len(captions) / 2:
        _warn(
            "half of the training captions have no blanks between words: BLEU, METEOR, ROUGE-L and CIDEr take each for "
            "one word; retrieval scores do not depend on it"
        )
    context = net.tokenizer.context_length
    lengths = [min(length, context) for length in net.tokenizer.lengths(captions)]
    written = complete(generate).lengths(context)[1]
    if lengths and net.decoder is not None and median(lengths) > written:  # such as Chinese in CLIP's byte pairs
        _warn(
            f"half of the training captions have more than the {written} tokens of a generated one: set "
            f"scoring.generate.max_length={max(lengths)}, and later generate.max_length={max(lengths)} for coca-caption"
        )
    if records and not records[0].question:  # an image has several
        takes_squares = net.image_encoder.input_kind is None
        check_images(drawn(records, ALIKE), net.image_size, takes_squares)


def check_captions(captions: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raises `DataError` if the tokenizer knows too few of their words; warns of some, and of captions that are cut."""
    unknown, count = unknown_words(captions, tokenizer)
    if unknown and len(unknown) > SOME * count:
        examples = ", ".join(dict.fromkeys(unknown[:3]))
        sentence = (
            f"{len(unknown) / count:.0%} of the words of the training captions are unknown to the vocabulary of "
            f"{tokenizer.vocab_size:,} tokens, e.g. {examples}: take experiment=my_photos, set vocabulary=2, or for "
            "shards model.net.tokenizer=clip, in each case without init_from, whose model keeps its vocabulary"
        )
        if len(unknown) > MOST * count:
            raise DataError(sentence)
        _warn(sentence)
    lengths = tokenizer.lengths(captions)
    cut = sum(length > tokenizer.context_length for length in lengths)
    if cut > SOME * len(captions):
        _warn(
            f"{cut / len(captions):.0%} of the training captions are longer than the model's context of "
            f"{tokenizer.context_length} tokens and are cut: the longest needs model.net.context_length={max(lengths)}",
        )


def check_images(records: Sequence[Record], image_size: int, takes_squares: bool = True) -> None:
    """Raises `DataError` if all images are equal; warns if they are far smaller than the model's input.

    Args:
        takes_squares: of that size; else no image is too small.
    """
    readable = _readable(records)
    images = list(islice(readable, IMAGES))
    if len(images) == IMAGES and all(image == images[0] for image in chain(images, readable)):
        count = len(records)
        raise DataError(f"{count} of {count} training images are the same image: check which files the data name")
    side = median(min(image.size) for image in images) if images else image_size
    if takes_squares and FAR * side < image_size:
        _warn(
            f"half of the images have at most {side:.0f} pixels on their shorter side, and the model takes "
            f"{image_size}: set image_size={side:.0f}, or use larger images",
        )


def _readable(records: Sequence[Record]) -> Iterator[Image.Image]:
    for record in records:
        with suppress(DataError), decoding():  # the training counts those
            image = record.image()
            image.load()
            yield image


def check_held_out(training: Sequence[Record], sets: Mapping[str, Sequence[Record]]) -> None:
    """Warns if photos that are trained on are in a set to score on too: by their paths, and for few photos by content.

    Args:
        sets: records by the name of the set.
    """
    files = {record.image.path for record in training if isinstance(record.image, ImageFile)}
    if not files:
        return
    by_size: dict[int, list[Path]] = {}
    for path in files if len(files) <= MAX_TRAINING else ():
        if path.is_file():
            by_size.setdefault(path.stat().st_size, []).append(path)
    for name, records in sets.items():
        paths = [record.image.path for record in records if isinstance(record.image, ImageFile)]
        shared = [path for path in paths if path in files]
        looked_at = len(paths)
        if not shared and by_size:
            some = [path for path in drawn(paths, MAX_HELD_OUT) if path.is_file()]
            looked_at = len(some)
            shared = [
                path
                for path in some
                if any(filecmp.cmp(path, p, shallow=False) for p in by_size.get(path.stat().st_size, ()))
            ]
        if shared:
            _warn(
                f"{len(shared)} of {looked_at} photos of {name} are trained on too, e.g. {shared[0].name}: "
                "scores on them say little; leave them out of one"
            )


def _warn(sentence: str) -> None:
    print_rank_zero(f"warning: {sentence}")

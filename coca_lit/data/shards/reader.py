"""From a shard to training examples: tars of KEY.jpg, KEY.txt and KEY.json, as img2dataset writes them.

Shards may come from strangers: nothing is unpickled or unpacked, members other than images, texts and JSON are not
read, and those that could hold code count as bad samples.
"""

import itertools
import logging
import random
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from coca_lit.data.bad_samples import BadSample, BadSampleError, BadSamples
from coca_lit.data.batch import Example
from coca_lit.data.examples import Index
from coca_lit.data.pixels import MAX_IMAGE, check_bytes, decode_pixels
from coca_lit.data.records import EncodedImage, Record, clean_captions
from coca_lit.data.shards.mixture import draw
from coca_lit.data.shards.shard import Shard
from coca_lit.data.shards.tar import TWICE, Member, group_members, tar_members
from coca_lit.data.transforms import TrainTransform, as_tensor
from coca_lit.errors import DataError
from coca_lit.models.patches import Images
from coca_lit.reading import parse_json
from coca_lit.seeding import stable_seed
from coca_lit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from coca_lit.data.encoded import CropOfEncoded, EncodedCrop

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_TEXT = 2**20  # bytes of a caption or of the JSON
_WANTED = re.compile(rf".*\.({'|'.join(IMAGE_SUFFIXES)}|txt|json)", re.IGNORECASE | re.DOTALL)
_CODE = re.compile(r".*\.(pyd|pickle|pkl|pth|pt|py|so|sh|exe)", re.IGNORECASE | re.DOTALL)


Pair = tuple[bytes, dict[str, tuple[str, ...]]]
"""An encoded image, and its captions by caption key, "txt" or a field of the JSON; none is empty."""


class Preprocess(NamedTuple):
    """Decodes and crops the image of a sample, draws one of the captions and tokenises it."""

    transform: TrainTransform
    tokenizer: Tokenizer
    caption_keys: Mapping[str, float]  # with the probability of each
    seed: int
    encoded: "CropOfEncoded | None" = None  # in place of `transform`, for images that are not decoded whole

    def __call__(self, pair: Pair, key: str, shard: str, index: Index, source: str) -> Example:
        """Crop and caption depend on seed, pass and key alone. Raises `BadSampleError` for an unreadable image."""
        image, captions = pair
        seed = (self.seed, index.turn, key)
        rng, name = random.Random(stable_seed("image", *seed)), f"{key} in {shard}"
        try:
            crop: Images | EncodedCrop
            if self.encoded:
                crop = self.encoded(image, name, rng, shard)
            else:
                crop = self.transform(as_tensor(decode_pixels(image, name)), rng, index.patches)
        except DataError as error:
            raise BadSampleError(BadSample(shard, key, "unreadable image", str(error))) from error
        caption = draw(captions, self.caption_keys, "caption", *seed)
        return Example(crop, self.tokenizer.encode(caption), f"{shard}/{key}", source=source)


def read_shard(shard: Shard, caption_keys: Collection[str], bad: BadSamples) -> Iterator[Record]:
    """The complete samples of a shard in tar order; broken ones are counted in `bad` and skipped. Arguments as of
    `pair_of`.
    """
    for fields in read_fields(shard, bad):
        key = fields["__key__"]
        try:
            image, captions = pair_of(fields, caption_keys, shard.name)
        except BadSampleError as error:
            bad.catch(error)
        else:
            yield Record(key, EncodedImage(image, "it"), itertools.chain(*captions.values()))


def pair_of(fields: dict[str, Any], caption_keys: Collection[str], shard: str) -> Pair:
    """The image and captions among the members with one key.

    Args:
        caption_keys: where captions may be: "txt" for KEY.txt, else a field of KEY.json that holds a text or a list
            of texts. A sample needs at least one of them.

    Raises:
        BadSampleError: it is not complete.
    """
    key, image = fields["__key__"], image_of(fields)
    captions, content = {}, {}
    if any(key != "txt" for key in caption_keys) and len(text := fields.get("json", b"")) <= MAX_TEXT:
        with suppress(DataError):
            content = parse_json(text, "the JSON", dict)
    for name in caption_keys:
        text = fields.get("txt", b"").decode(errors="replace") if name == "txt" else content.get(name)
        texts = text if isinstance(text, list) else [text]
        fitting = clean_captions(text for text in texts if isinstance(text, str) and len(text) <= MAX_TEXT)
        if fitting:
            captions[name] = fitting
    try:
        check_bytes(len(image), f"{key} in {shard}")
    except DataError as error:
        raise BadSampleError(BadSample(shard, key, "unreadable image", str(error))) from error
    if image and captions:
        return image, captions
    missing = f"no caption in the JSON under {', '.join(caption_keys)}"
    if not image or "txt" in caption_keys:
        missing = "missing caption" if image else "missing image"
    raise BadSampleError(BadSample(shard, key, missing))


def read_fields(
    shard: Shard, bad: BadSamples, verify: bool = False, content: bool = True, file: BinaryIO | None = None
) -> Iterator[dict[str, Any]]:
    """The members of each selected sample by suffix, and its "__key__"; counts these samples, and faults of the shard
    as a whole.

    Args:
        content: False gives the (offset, size) in bytes of each member in place of its content.
        file: the open shard, which is then not compared with its manifest; by default a local copy is opened.
    """
    read, error = 0, None
    kept = shard.selection.keys(shard.file_name) if shard.selection else None
    try:
        with nullcontext(file) if file else shard.local(verify) as source:
            for fields in group_members(_members(source, shard.name, bad, content), content):
                if kept is not None and fields["__key__"] not in kept:
                    continue
                read += 1
                bad.seen += 1
                if TWICE in fields:
                    bad.add("two members of the same name", shard.name, fields["__key__"], fields[TWICE])
                else:
                    yield fields
    except DataError:
        raise
    except Exception as broken:  # tarfile, zlib, gzip and fsspec raise many types
        error = str(broken) or type(broken).__name__
    if error:
        log.warning("%s is broken or truncated: %s", shard.name, error)
        bad.lose("broken or truncated shard", shard.name, shard.samples, read, error)
    elif not read:
        bad.lose("empty shard", shard.name, shard.samples, read)
    else:
        bad.end_of_shard(read)


def holds_code(member: str) -> bool:
    """Whether the name of a member belongs to a pickle, a script or a binary."""
    return _CODE.fullmatch(member) is not None


def image_of(fields: Mapping[str, Any]) -> Any:
    """The image among the members of a sample, empty bytes if there is none."""
    return next((fields[suffix] for suffix in IMAGE_SUFFIXES if suffix in fields), b"")


def read_limit(member: str) -> int:
    """How many bytes of a member are read, at most: one more than its kind may have."""
    if not (found := _WANTED.fullmatch(member)):
        return 0
    return (MAX_TEXT if found[1].lower() in ("txt", "json") else MAX_IMAGE) + 1


def _members(source: Path | BinaryIO, shard: str, bad: BadSamples, content: bool) -> Iterator[Member]:
    for member in tar_members(source, read_limit if content else lambda name: 0):
        if _WANTED.fullmatch(member.name):
            yield member
        elif holds_code(member.name):
            bad.seen += 1
            bad.add("code in a shard", shard, member.name)

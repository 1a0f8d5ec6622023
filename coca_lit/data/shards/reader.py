"""From a shard to training examples: tars of KEY.jpg, KEY.txt and KEY.json, as img2dataset writes them.

Shards may come from strangers: nothing is unpickled or unpacked, members other than images, texts and JSON are not
read, and those that could hold code count as bad samples.
"""

import logging
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from coca_lit.data.bad_samples import BadSample, BadSampleError, BadSamples
from coca_lit.data.batch import Example
from coca_lit.data.records import MAX_IMAGE, check_bytes, clean_captions
from coca_lit.data.shards.listing import Shard, check_digest
from coca_lit.data.shards.mixture import draw
from coca_lit.data.shards.tar import TWICE, Member, group_members, tar_members
from coca_lit.data.transforms import CropOfEncoded, EncodedCrop, TrainTransform, decode_pixels
from coca_lit.errors import DataError
from coca_lit.models.patches import Images
from coca_lit.reading import parse_json
from coca_lit.seeding import stable_seed
from coca_lit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_TEXT = 2**20  # bytes of a caption or of the JSON
_WANTED = re.compile(rf".*\.({'|'.join(IMAGE_SUFFIXES)}|txt|json)", re.IGNORECASE | re.DOTALL)
_CODE = re.compile(r".*\.(pyd|pickle|pkl|pth|pt|py|so|sh|exe)", re.IGNORECASE | re.DOTALL)


class ShardSample(NamedTuple):
    """A complete sample, its image still encoded."""

    key: str
    image: bytes
    captions: dict[str, tuple[str, ...]]  # by caption key: "txt" or a field of the JSON; none is empty
    shard: str  # for error reports

    @property
    def bytes(self) -> int:
        """Of memory, about."""
        texts = (text for captions in self.captions.values() for text in captions)
        return len(self.image) + sum(64 + len(text) for text in texts)


class Preprocess(NamedTuple):
    """Decodes and crops the image, draws one of the captions and tokenises it."""

    transform: TrainTransform | CropOfEncoded
    tokenizer: Tokenizer
    caption_keys: Mapping[str, float]  # with the probability of each
    seed: int

    def __call__(self, sample: ShardSample, source: str, *turn: int, patches: Sequence[int] = ()) -> Example:
        """Crop and caption depend on seed, turn and key alone. Raises `BadSampleError` for an unreadable image."""
        seed: tuple[int | str, ...] = (self.seed, *turn, sample.key)
        rng, name = random.Random(stable_seed("image", *seed)), f"{sample.key} in {sample.shard}"
        crop: Images | EncodedCrop
        try:
            if isinstance(self.transform, CropOfEncoded):
                crop = self.transform(sample.image, name, rng)
                if isinstance(crop, EncodedCrop):
                    crop = crop._replace(shard=sample.shard)
            else:
                crop = self.transform(decode_pixels(sample.image, name), rng, *patches)
        except DataError as error:
            raise BadSampleError(BadSample(sample.shard, sample.key, "unreadable image", str(error))) from error
        caption = draw(sample.captions, self.caption_keys, "caption", *seed)
        return Example(crop, self.tokenizer.encode(caption), f"{sample.shard}/{sample.key}", source=source)


def read_shard(
    shard: Shard, caption_keys: Collection[str], bad: BadSamples, verify: bool = False
) -> Iterator[ShardSample]:
    """The complete samples of a shard in tar order; broken ones are counted in `bad` and skipped.

    Args:
        caption_keys: where captions may be: "txt" for KEY.txt, else a field of KEY.json that holds a text or a list
            of texts. A sample needs at least one of them.
        verify: first compare the digest with the manifest; raises `DataError` if it differs.
    """
    for fields in read_fields(shard, bad, verify):
        try:
            sample = sample_of(fields, caption_keys, shard.name)
        except BadSampleError as error:
            bad.catch(error)
        else:
            yield sample


def sample_of(fields: dict[str, Any], caption_keys: Collection[str], shard: str) -> ShardSample:
    """The sample made of the members with one key; raises `BadSampleError` if it is not complete."""
    image, captions = image_of(fields), _captions(fields, caption_keys)
    try:
        check_bytes(len(image), f"{fields['__key__']} in {shard}")
    except DataError as error:
        raise BadSampleError(BadSample(shard, fields["__key__"], "unreadable image", str(error))) from error
    if image and captions:
        return ShardSample(fields["__key__"], image, captions, shard)
    missing = f"no caption in the JSON under {', '.join(caption_keys)}"
    if not image or "txt" in caption_keys:
        missing = "missing caption" if image else "missing image"
    raise BadSampleError(BadSample(shard, fields["__key__"], missing))


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
        with nullcontext(file) if file else shard.local() as source:
            if verify and shard.entry and isinstance(source, Path):
                check_digest(shard.name, source, shard.entry)
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
    expected = shard.samples
    if error:
        log.warning("%s is broken or truncated: %s", shard.name, error)
        bad.lose("broken or truncated shard", shard.name, expected, read, error)
    elif not read:
        bad.lose("empty shard", shard.name, expected, read)
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


def _captions(fields: dict[str, Any], keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Captions by key, stripped; texts that are far too long for one are left out."""
    found: dict[str, tuple[str, ...]] = {}
    content = _json(fields) if any(key != "txt" for key in keys) else {}
    for key in keys:
        text = _text(fields) if key == "txt" else content.get(key)
        texts = text if isinstance(text, list) else [text]
        found[key] = clean_captions(text for text in texts if isinstance(text, str) and len(text) <= MAX_TEXT)
    return {key: captions for key, captions in found.items() if captions}


def _text(fields: dict[str, Any]) -> str:
    return fields.get("txt", b"")[: MAX_TEXT + 1].decode("utf-8", errors="replace")


def _json(fields: dict[str, Any]) -> dict[str, Any]:
    text = fields.get("json", b"")
    try:
        return parse_json(text, "the JSON", dict) if len(text) <= MAX_TEXT else {}
    except DataError:
        return {}

"""The samples of a whole shard in tar order: to index it, to check it, or to copy it.

Shards may come from strangers: nothing is unpickled or unpacked, members other than images, declared kinds of input,
texts and JSON are not read, and those that could hold code count as bad samples.
"""

import itertools
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from coca_lit.data.bad_samples import BadSampleError, BadSamples
from coca_lit.data.inputs import IMAGES, ImageReader
from coca_lit.data.records import Record
from coca_lit.data.shards.sample import pair_of, read_limit, suffix_of
from coca_lit.data.shards.shard import ChangedError, Shard
from coca_lit.data.shards.tar import TWICE, Member, group_members, tar_members
from coca_lit.errors import DataError
from coca_lit.reading import may_pass

log = logging.getLogger(__name__)

_CODE = re.compile(r".*\.(pyd|pickle|pkl|pth|pt|py|so|sh|exe)", re.IGNORECASE | re.DOTALL)


def read_shard(
    shard: Shard,
    caption_keys: Collection[str],
    bad: BadSamples,
    readers: Sequence[ImageReader] = (IMAGES,),
) -> Iterator[Record]:
    """The complete samples of a shard in tar order; broken ones are counted in `bad` and skipped. Other arguments as of
    `pair_of`.

    Args:
        readers: of the image of a sample; the first one that finds its member reads it.
    """
    for fields in read_fields(shard, bad):
        found = (reader for reader in readers if suffix_of(fields, reader.suffixes))
        reader = next(found, readers[0])
        try:
            content, captions = pair_of(fields, caption_keys, shard.name, reader)
        except BadSampleError as error:
            bad.catch(error)
        else:
            yield Record(fields["__key__"], reader.member(content, "it"), itertools.chain(*captions.values()))


def read_fields(
    shard: Shard, bad: BadSamples, verify: bool = False, content: bool = True, file: BinaryIO | None = None
) -> Iterator[dict[str, Any]]:
    """The members of each selected sample by suffix, and its "__key__"; counts these samples, and faults of the shard
    as a whole.

    Args:
        verify: for what is kept, such as an index: raises `DataError` if the shard differs from its manifest, or cannot
            be read for a reason that may pass.
        content: False gives the (offset, size) in bytes of each member in place of its content.
        file: the open shard, which is then not compared with its manifest; by default a local copy is opened.
    """
    read = 0
    error = None
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
        if verify and (may_pass(broken) or isinstance(broken, ChangedError)):
            raise DataError(f"{shard} could not be read ({broken}): start again, or remove it") from broken
        error = str(broken) or type(broken).__name__
    if error:
        if not bad.quiet:
            log.warning("%s is broken or truncated: %s", shard.name, error)
        bad.lose("broken or truncated shard", shard.name, shard.samples, read, error)
    elif not read:
        bad.lose("empty shard", shard.name, shard.samples, read)
    else:
        bad.end_of_shard(read)


def holds_code(member: str) -> bool:
    """Whether the name of a member belongs to a pickle, a script or a binary."""
    return _CODE.fullmatch(member) is not None


def _members(source: Path | BinaryIO, shard: str, bad: BadSamples, content: bool) -> Iterator[Member]:
    for member in tar_members(source, read_limit if content else lambda name: 0):
        if read_limit(member.name):
            yield member
        elif holds_code(member.name):
            bad.seen += 1
            bad.add("code in a shard", shard, member.name)

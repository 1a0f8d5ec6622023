"""Reads and decodes every sample of a set of shards, as training will: `coca-data check`."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.inputs import IMAGES, other_endings, reader_of
from coca_lit.data.shards.scan import read_shard
from coca_lit.data.shards.shard import MANIFEST, ManifestEntry, Shard, entry_of, read_manifest, sha256_of
from coca_lit.errors import DataError
from coca_lit.files import append_lines, size_and_time, whole_lines
from coca_lit.reading import counts_of, is_int64, parse_json, texts_of
from coca_lit.tools.prepare import Run

JOURNAL = f".{MANIFEST}.journal"  # the reports of an interrupted check


class ShardReport(NamedTuple):
    """The result of checking one shard."""

    path: str
    changed_at: int  # modification time in ns, by which a later check skips an unchanged shard
    entry: ManifestEntry
    bad: dict[str, int]  # number of samples per reason
    examples: list[str]  # the first few, with what is wrong
    broken: str = ""  # why the shard as a whole cannot be used


def check_shard(path: Path, caption_key: str = "txt") -> ShardReport:
    """Decodes every image and caption of a shard, of other kinds of input one picture."""
    bad = BadSamples(1.0, quiet=True)
    good = 0
    readers = [IMAGES, *dict.fromkeys(map(reader_of, other_endings()))]
    changed_at = os.stat(path).st_mtime_ns  # before it is read: it may still be written
    for record in read_shard(Shard(str(path)), [caption_key], bad, readers):
        try:
            record.image()
            good += 1
        except DataError as error:
            bad.add("unreadable image", str(path), str(record.id), str(error))
    entry = ManifestEntry(good, os.path.getsize(path), sha256_of(path))
    broken = next((reason for reason in bad.reasons if reason in ("broken or truncated shard", "empty shard")), "")
    return ShardReport(str(path), changed_at, entry, dict(bad.reasons), bad.examples(), broken)


def check_shards(paths: Sequence[Path], caption_key: str, run: Run) -> Iterator[ShardReport]:
    """Reports in the order in which they are ready. Each is recorded in a journal beside its shard, so that an
    interrupted check resumes where it stopped; remove `JOURNAL` when all is done.

    Args:
        run: calls `check_shard` for all paths, anywhere.
    """
    known = _journals({path.parent for path in paths}, caption_key)
    todo = []
    for path in paths:
        report = known.get(str(path))
        if report and not report.broken and (report.entry.bytes, report.changed_at) == size_and_time(path):
            yield report
        else:
            todo.append(path)
    for report in run(check_shard, todo, caption_key):
        append_lines(Path(report.path).parent / JOURNAL, [json.dumps([caption_key, report])])
        yield report


def compare(reports: Sequence[ShardReport]) -> Iterator[str]:
    """One sentence for each shard that does not match the manifest of its folder, or is listed there but missing."""
    found = by_folder(reports)
    for folder, entries in found.items():
        manifest = read_manifest(folder)
        for name, entry in entries.items() if manifest else ():
            if name not in manifest:
                yield f"{folder / name} is not in the manifest"
            elif entry != manifest[name]:
                yield f"{folder / name} has changed since the manifest was written"
        yield from (f"{folder / name} is in the manifest but gone" for name in manifest if not (folder / name).exists())


def by_folder(reports: Sequence[ShardReport]) -> dict[Path, dict[str, ManifestEntry]]:
    """The entries for the manifest of each folder."""
    found: dict[Path, dict[str, ManifestEntry]] = {}
    for report in reports:
        path = Path(report.path)
        found.setdefault(path.parent, {})[path.name] = report.entry
    return found


def _journals(folders: set[Path], caption_key: str) -> dict[str, ShardReport]:
    reports = {}
    for path in (folder / JOURNAL for folder in folders):
        for line in whole_lines(path):
            try:
                key, row = parse_json(line, str(path), list, keep_surrogates=True)
                name, changed_at, entry, bad, examples, broken = row
                if not (isinstance(name, str) and isinstance(broken, str) and is_int64(changed_at)):
                    raise TypeError(f"expected path, time and reason, got {name!r}, {changed_at!r}, {broken!r}")
                entry = entry_of(entry)
                bad = counts_of(bad)
                examples = texts_of(examples)
            except (DataError, ValueError, TypeError):
                continue  # damaged by a crash of the machine
            if key == caption_key:
                reports[name] = ShardReport(name, changed_at, entry, bad, examples, broken)
    return reports

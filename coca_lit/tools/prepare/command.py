"""`coca-data prepare SOURCE OUTPUT` writes shards, `coca-data check SHARDS` reads and decodes every sample of them,
`coca-data spice` fetches what SPICE needs, `coca-data cache` shows or removes what can be made again. Projects add
further subcommands.

Where shards are worked on is a key as of other commands, engine=gpus engine.devices=[0,1], see
`coca_lit.tools.engines`.
"""

import argparse
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coca_lit import extensions
from coca_lit.errors import ConfigError
from coca_lit.machine import in_shell
from coca_lit.runs.launch import isolate
from coca_lit.tools.commands import command_for
from coca_lit.tools.prepare.subcommand import (
    SHARDS,
    data_parser,
    is_of_engine,
    positive,
    print_faults,
    run_subcommand,
)

if TYPE_CHECKING:
    from coca_lit.data.shards.shard import ManifestEntry
    from coca_lit.tools.engines import Work
    from coca_lit.tools.prepare.subcommand import SubcommandParser, Subcommands

EXAMPLE = "for example: coca-data prepare captions.csv shards/"
PREPARE = """\
Writes a .csv, .tsv or .parquet file of local images and captions, a folder with captions.csv, .tsv, .jsonl or .json, a
COCO or Flickr folder, a folder of NAME.jpg and NAME.txt, or the .tar files of img2dataset as shards with a manifest and
indexes. Images are decoded once and copied as they are; broken ones are left out. An interrupted command resumes where
it stopped."""
CHECK = """\
Decodes every image and caption of a set of shards, names what is broken, and writes manifest.json beside the shards:
samples, bytes and sha256 of each, and an index of each. Training then refuses a shard that has changed, and begins at
once, also on a copy of the folder on an object store. An existing manifest is compared first. An interrupted check
resumes where it stopped."""
SPICE = """\
Fetches Stanford CoreNLP 3.6.0 (400 MB, GPL 3), by which SPICE parses captions, and keeps its two jars. An interrupted
download resumes where it stopped."""

CACHE = """\
Shows what commands keep in your cache folder, $XDG_CACHE_HOME/coca_lit or else ~/.cache/coca_lit, and its size. All of
it is made or fetched again when it is needed."""


def data(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `coca-data`. A `UserError` is one sentence on standard error and exit code 1."""
    isolate()
    given = sys.argv[1:] if arguments is None else arguments
    words = sorted(given, key=is_of_engine)  # behind the subcommand
    parser, subcommands = data_parser("Prepares, checks and chooses data, fetches what scores of captions need.")
    _add_prepare(subcommands)
    _add_check(subcommands)
    _add_spice(subcommands)
    _add_cache(subcommands)
    is_own = words[:1] and words[0] in subcommands.choices
    for word, declared in extensions.commands("data").items():
        if word not in subcommands.choices:
            subcommands.add_parser(word, help=declared.help)
    if not words:
        sys.exit(f"error: name what to do: {', '.join(subcommands.choices)}; {EXAMPLE} (more: coca-data --help)")
    try:
        of_project = None if is_own else command_for("data", words)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    if of_project is None:
        run_subcommand(parser, words)
    else:
        of_project(words)


def _add_check(subcommands: "Subcommands") -> None:
    about = "decode every sample and write a manifest"
    parser = subcommands.add_parser("check", help=about, description=CHECK)
    parser.add_argument("shards", nargs="+", help=SHARDS)
    parser.add_argument(
        "--caption-key", default="txt", help="field of the samples' JSON that holds the caption (default: the .txt)"
    )
    parser.add_argument("--update", action="store_true", help="accept shards that changed since the manifest")
    _add_common(parser)
    parser.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> None:
    from coca_lit.data.shards.listing import local_shards
    from coca_lit.data.shards.shard import read_manifest, write_manifest
    from coca_lit.errors import DataError
    from coca_lit.tools.prepare import check as shard_check

    paths = local_shards(options.shards)
    work = _work(options, "checking")
    reports = [*shard_check.check_shards(paths, options.caption_key, work)]
    for report in sorted(reports):
        print_faults(report.path, report.bad, report.examples)
    work.close(len(paths))
    broken = [report for report in reports if report.broken]
    if broken:
        raise DataError(
            f"{len(broken)} of {len(reports)} shards cannot be used, e.g. {broken[0].path} ({broken[0].broken}): "
            "write them again or remove them, then repeat the command; no manifest was written"
        )
    good = sum(report.entry.samples for report in reports)
    bad = sum(sum(report.bad.values()) for report in reports)
    _judge(good, bad, options.max_bad_fraction)
    changes = list(shard_check.compare(reports))
    if changes and not options.update:
        raise DataError(
            f"{changes[0]}{f', and {len(changes) - 1} more like it' if len(changes) > 1 else ''}: "
            "restore the shards, or accept the present ones with --update"
        )
    folders = shard_check.by_folder(reports)
    for folder, entries in folders.items():
        others = {name: entry for name, entry in read_manifest(folder).items() if (folder / name).is_file()}
        print(f"wrote {write_manifest(folder, others | entries)}")
    of_all = {folder / name: entry for folder, entries in folders.items() for name, entry in entries.items()}
    _write_indexes(of_all, options)
    for folder in folders:  # not before: it says what need not be decoded again
        (folder / shard_check.JOURNAL).unlink(missing_ok=True)
    _print_total([report.entry for report in reports], bad)


def _write_indexes(entries: "Mapping[Path, ManifestEntry]", options: argparse.Namespace) -> None:
    """Beside the shards, for training on these and on copies of the folder on an object store."""
    from coca_lit.data.shards.index import load_index, make_index
    from coca_lit.data.shards.shard import Shard

    shards = [Shard(str(path), entry) for path, entry in entries.items() if path.suffix == ".tar"]
    missing = [shard for shard in shards if not load_index(shard, Path(shard.name).parent)]
    if missing:
        work = _work(options, "indexing")
        deque(work(make_index, missing, Path(missing[0].name).parent), maxlen=0)
        work.close(len(missing))


def _add_prepare(subcommands: "Subcommands") -> None:
    parser = subcommands.add_parser("prepare", help="write captioned images as shards", description=PREPARE)
    parser.add_argument(
        "source",
        type=Path,
        help="table, folder with one, COCO or Flickr folder, folder of images and texts, or of tars",
    )
    parser.add_argument("output", type=Path, help="folder for the shards")
    parser.add_argument("--image-column", help="of a table (default: image, image_path, filename, ...)")
    parser.add_argument("--caption-column", help="of a table (default: caption, text, title, ...)")
    parser.add_argument("--split", default="train", help="where table or folder name splits (default: %(default)s)")
    parser.add_argument(
        "--samples-per-shard", type=positive, help="default: 10,000, or fewer so that there are 16 shards"
    )
    _add_common(parser)
    parser.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> None:
    from coca_lit.data.shards.listing import local_shards
    from coca_lit.data.shards.shard import write_manifest
    from coca_lit.errors import DataError
    from coca_lit.tools.prepare import write as prepare

    every_caption = ""  # else a run trains on the first of each photo
    if options.source.is_dir() and [*options.source.glob("*.tar")]:
        if options.image_column or options.caption_column or options.samples_per_shard or options.split != "train":
            raise DataError("columns, --split and --samples-per-shard are for tables and folders, not for .tar files")
        tasks = [prepare.Task(*numbered) for numbered in enumerate(local_shards(str(options.source)))]
    else:
        pairs = prepare.read_pairs(options.source, options.image_column, options.caption_column, options.split)
        tasks = prepare.plan_pairs(pairs, options.samples_per_shard)
        if any(len(pair.captions) > 1 for pair in pairs):
            every_caption = " data.caption_keys=captions"
    work = _work(options, "writing")
    shards = [*prepare.prepare(tasks, options.output, work)]
    for shard in sorted(shards):
        print_faults(str(options.output / shard.name), shard.bad, shard.examples)
    work.close(len(tasks))
    good = sum(shard.entry.samples for shard in shards)
    bad = sum(sum(shard.bad.values()) for shard in shards)
    _judge(good, bad, options.max_bad_fraction)
    entries = {shard.name: shard.entry for shard in shards if shard.entry.samples}
    print(f"wrote {write_manifest(options.output, entries)}")
    _write_indexes({options.output / name: entry for name, entry in entries.items()}, options)
    _print_total(list(entries.values()), bad)
    folder = in_shell([str(options.output)])
    none = in_shell(["evals=[]"])
    print(f"coca-train experiment=pretrain_b32 data.shards={folder}{every_caption} data.epoch_samples=null {none}")


def _add_spice(subcommands: "Subcommands") -> None:
    parser = subcommands.add_parser("spice", help="fetch the two jars that SPICE needs", description=SPICE)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="default: ~/.cache/coca_lit/spice, where SPICE looks first"
    )
    parser.set_defaults(run=_fetch_spice)


def _fetch_spice(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from coca_lit.errors import DataNotFoundError
    from coca_lit.metrics.java.spice import FOLDER, JARS_VARIABLE, SpiceError
    from coca_lit.tools.prepare.spice_jars import fetch_jars

    folder = options.folder or FOLDER.expanduser()
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("CoreNLP", total=None)
            others = fetch_jars(folder, lambda done, total: bar.update(task, completed=done, total=total))
    except SpiceError as error:
        raise DataNotFoundError(str(error)) from error
    for jar in others:
        print(f"warning: {jar} is not the file that Maven has; SPICE is tested with that one", file=sys.stderr)
    print(f"SPICE is ready: {folder}" + (f"; set {JARS_VARIABLE} to it" if options.folder else ""))


def _add_cache(subcommands: "Subcommands") -> None:
    parser = subcommands.add_parser("cache", help="show or remove the caches of all runs", description=CACHE)
    parser.add_argument("--remove", action="store_true", help="remove the views of photos")
    parser.set_defaults(run=_cache)


def _cache(options: argparse.Namespace) -> None:
    from coca_lit.data.view_folder import size_of, view_folder
    from coca_lit.files import remove

    folder = view_folder()
    size = size_of(folder)
    if options.remove:
        remove(folder)
        print(f"removed {folder}, {size / 1e9:.2f} GB")
        return
    for path, what in ((folder, "views of own photos"), (folder.with_name("shards"), "copies of remote shards")):
        print(f"{path}: {size_of(path) / 1e9:.2f} GB, {what}")


def _add_common(parser: "SubcommandParser") -> None:
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.05,
        metavar="FRACTION",
        help="fraction of bad samples above which no manifest is written (default: %(default)s)",
    )
    parser.add_engine()
    parser.add_argument(
        "--workers",
        type=positive,
        help="processes of this machine, or of each job (default: one per core)",
    )


def _judge(good: int, bad: int, limit: float) -> None:
    from coca_lit.errors import DataError

    if bad > limit * (good + bad):
        raise DataError(
            f"{bad} of {good + bad} samples are bad, more than --max-bad-fraction {limit}; no manifest was written"
        )


def _work(options: argparse.Namespace, doing: str) -> "Work":
    from coca_lit.tools.engines import Work, engine_from

    return Work(engine_from(options.engine, ["cpu"] * options.workers if options.workers else "cores"), doing)


def _print_total(entries: "Sequence[ManifestEntry]", bad: int) -> None:
    good = sum(entry.samples for entry in entries)
    size = sum(entry.bytes for entry in entries)
    print(f"{len(entries):,} shards, {good:,} samples, {size / 1e9:.3g} GB; {bad:,} bad samples are left out")

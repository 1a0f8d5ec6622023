"""`coca-data check SHARDS...` looks at every sample of a set of shards and writes their manifest."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coca_lit.data.shard_check import ShardReport

CHECK = """\
Decodes every image and caption of a set of shards, names what is broken, and writes manifest.json beside the shards:
samples, bytes and sha256 of each. Training then refuses a shard that has changed. With a manifest from before, it
compares. An interrupted check goes on where it was."""


def data(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `coca-data`. Mistakes of the user are one sentence on standard error and exit code 1."""
    parser = argparse.ArgumentParser("coca-data", description="Prepares and checks image-text shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_check(commands)
    options = parser.parse_args(arguments)

    from coca_lit.data.records import DataError

    try:
        options.run(options)
    except (DataError, FileNotFoundError, PermissionError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("check", help="look at every sample and write a manifest", description=CHECK)
    parser.add_argument("shards", nargs="+", help="folders, 'FOLDER/{00000..00099}.tar', 'FOLDER/*.tar'")
    parser.add_argument(
        "--caption-key", default="txt", help="field of the samples' JSON that holds the caption (default: the .txt)"
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.05,
        metavar="FRACTION",
        help="of bad samples above which no manifest is written (default: %(default)s)",
    )
    parser.add_argument("--update", action="store_true", help="accept shards that changed since the manifest")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> None:
    from coca_lit.data import shard_check
    from coca_lit.data.manifest import read_manifest, write_manifest
    from coca_lit.data.records import DataError
    from coca_lit.data.shard_set import local_shards

    paths = local_shards(options.shards)
    reports = _with_progress(shard_check.check_shards(paths, options.caption_key, options.workers), len(paths))
    _print_faults(reports)
    if broken := [report for report in reports if report.broken]:
        raise DataError(
            f"{len(broken)} of {len(reports)} shards cannot be used, e.g. {broken[0].path} ({broken[0].broken}): "
            "write them again or remove them, then repeat the command; no manifest was written"
        )
    good, bad = sum(report.entry.samples for report in reports), sum(report.bad_samples for report in reports)
    if bad > options.max_bad_fraction * (good + bad):
        raise DataError(
            f"{bad} of {good + bad} samples are bad, more than --max-bad-fraction {options.max_bad_fraction}; "
            "no manifest was written"
        )
    changes = list(shard_check.compare(reports))
    if changes and not options.update:
        raise DataError(
            f"{changes[0]}{f', and {len(changes) - 1} more like it' if len(changes) > 1 else ''}: "
            "restore what was there, or accept what is there now with --update"
        )
    folders = shard_check.by_folder(reports)
    for folder, entries in folders.items():
        others = {name: entry for name, entry in read_manifest(folder).items() if (folder / name).is_file()}
        print(f"wrote {write_manifest(folder, others | entries)}")
    shard_check.forget_journals(set(folders))
    size = sum(report.entry.bytes for report in reports)
    print(f"{len(reports):,} shards, {good:,} samples, {size / 1e9:.3g} GB; {bad:,} bad samples are left out")


def _with_progress(reports: "Iterator[ShardReport]", total: int) -> "list[ShardReport]":
    from rich.console import Console
    from rich.progress import track

    return list(track(reports, "checking", total, console=Console(stderr=True)))


def _print_faults(reports: "Sequence[ShardReport]") -> None:
    for report in sorted(reports, key=lambda report: report.path):
        if report.bad:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in report.bad.items())
            print(f"{report.path}: {reasons} ({'; '.join(report.examples)})")


if __name__ == "__main__":
    data()

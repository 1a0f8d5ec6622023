"""Tables of the benchmarks, from the newest row of every case in their CSVs.

The CSVs hold more columns than the tables, versions of all packages among them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from coca_lit.tools.report.tables import Table, markdown
from experiments.study import Row, read_rows, readable

FOLDER = Path(__file__).resolve().parent
SIDES = ("engine", "way")  # columns that say which program a row measured
PACKAGES = ("torch", "open_clip_torch")
SPELLED = {"Bleu": "BLEU-1 to BLEU-4", "ROUGE_L": "ROUGE-L"}


class Layout(NamedTuple):
    """What a table shows of a CSV.

    Attributes:
        names: {column: title} of the cells that name a row.
        values: {title: column}, or {title: (column, side)} where the rows of several sides stand in one. A title that
            ends with "%" takes a share of 1.
        only: {column: values}; other rows stay in the CSV.
    """

    names: Mapping[str, str]
    values: Mapping[str, str | tuple[str, str]]
    only: Mapping[str, Sequence[str]] = {}


FASTER = "times as fast"
LAYOUTS: dict[str, Layout] = {
    "train_step": Layout(
        {"case": "step"},
        {"OpenCLIP, s": "theirs s", "coca_lit, s": "ours s", FASTER: "ratio", "target": "target"},
        {"what": ("", "OpenCLIP's / ours")},
    ),
    "train_step/clip": Layout(
        {"case": "step", "what": "ratio of"},
        {"time": "ratio", "target": "target"},
        {"what": ("our CoCa / OpenCLIP's CLIP", "our CoCa / our CLIP")},
    ),
    "train_step/options": Layout(
        {"case": "step", "what": "against"},
        {"OpenCLIP, s": "theirs s", "coca_lit, s": "ours s", FASTER: "ratio"},
        {"what": ("OpenCLIP, fused loss", "OpenCLIP, fused loss, compiled")},
    ),
    "limits": Layout(
        {"case": "what", "limit": "bound by"},
        {"reached": "reached", "peak of the machine": "peak", "share of the peak, %": "share"},
    ),
    "native_aspect": Layout(
        {"case": "batch of"},
        {
            "images": "images",
            "image tokens": "image tokens",
            "padding, %": "padding",
            "CPU s": "CPU s",
            "images/s": "images/s",
            "time, times that of squares": "time of squares",
        },
    ),
    "memory": Layout(
        {"precision": "precision", "engine": "variant"},
        {
            "OpenCLIP, MiB/sample": "OpenCLIP MiB/sample",
            "coca_lit, MiB/sample": "MiB/sample",
            "ratio": "ratio",
            "target": "target",
        },
    ),
    "convolutional": Layout(
        {"case": "encoder"},
        {
            "timm, images/s": ("images/s", "timm"),
            "coca_lit, images/s": ("images/s", "ours"),
            FASTER: ("ratio", "ours"),
            "without keeping freed memory": ("ratio", "ours, memory given back"),
        },
    ),
    "gpu_operations": Layout(
        {"case": "for each"},
        {
            f"{title}, {name}": (column, side)
            for title, column in (("operations", "operations"), ("waits", "waits"), ("MB", "MB"))
            for name, side in (("OpenCLIP", "open_clip"), ("coca_lit", "coca_lit"))
        },
    ),
    "input_pipeline": Layout(
        {"case": "data", "what": "stage"},
        {"OpenCLIP, µs/sample": "theirs µs", "coca_lit, µs/sample": "ours µs", FASTER: "ratio"},
        {
            "case": ("synthetic photos, short side 256-512", "photos in images"),
            "what": ("all, indexed shards", "decode", "crop and resize"),
        },
    ),
    "input_pipeline/sizes": Layout(
        {"what": "synthetic photos"},
        {"OpenCLIP, µs/sample": "theirs µs", "coca_lit, µs/sample": "ours µs", FASTER: "ratio"},
        {"case": ("decode, crop and resize synthetic photos",)},
    ),
    "contrastive": Layout(
        {"case": "loss", "batch": "batch"},
        {"tiled, s": "tiled s", FASTER: "speed", "tiled, MiB": "tiled MiB", "memory, % of the other's": "memory"},
    ),
    "gradient_caching": Layout(
        {"case": "batch of 64"},
        {
            "memory, MiB": "MiB",
            "memory, %": "memory",
            "CPU s": "CPU s",
            "time, times": "time",
            "loss difference": "loss difference",
        },
    ),
    "generation": Layout(
        {"strategy": "strategy", "batch": "images"},
        {
            "OpenCLIP, s/caption": ("seconds_per_caption", "open_clip"),
            "fp32, s/caption": ("seconds_per_caption", "fp32"),
            f"fp32, {FASTER}": ("ratio", "fp32"),
            "bf16, s/caption": ("seconds_per_caption", "bf16"),
            f"bf16, {FASTER}": ("ratio", "bf16"),
        },
    ),
    "generation/memory": Layout(
        {"strategy": "strategy", "batch": "images"},
        {
            "OpenCLIP, MB": ("peak_MB", "open_clip"),
            "fp32, MB": ("peak_MB", "fp32"),
            "bf16, MB": ("peak_MB", "bf16"),
            "fp32 captions equal to OpenCLIP's": ("equal", "fp32"),
            "bf16 captions equal": ("equal", "bf16"),
        },
    ),
    "scoring": Layout({"score": "score"}, {"s": "seconds"}),
    "retrieval": Layout({"way": "recall by"}, {"s": "seconds", "extra peak memory, MB": "extra peak MB"}),
    "caption_folder": Layout(
        {column: column for column in ("model", "precision", "strategy", "batch", "workers")},
        {"images": "images", "images/s": "images/s", "time inside the model, %": "inside the model"},
    ),
    "startup": Layout({"case": "command"}, {"s": "wall s", "target, s": "target"}),
    "from_nothing": Layout(
        {"case": "step", "other programs": "other programs"}, {"s": "seconds", "target, s": "target"}
    ),
    "busy": Layout(
        {"case": "task", "other programs": "other programs"},
        {f"{way}, samples/s": ("samples/s", way) for way in ("long waits", "as shipped", "one thread")},
    ),
}

IN_THE_PAGE = ("train_step", "input_pipeline", "generation")  # moved.py reads all


def tables() -> dict[str, str]:
    return {f"benchmarks/{name}": table(recorded(name), LAYOUTS[name]) for name in IN_THE_PAGE}


def recorded(name: str) -> list[Row]:
    """All rows of the CSV that a table is made of, in the order in which they were measured."""
    return read_rows(FOLDER / f"{name.partition('/')[0]}.csv")


def table(recorded: Sequence[Row], layout: Layout) -> str:
    """Markdown of a layout and, below it, the command and where its rows were measured."""
    rows = [row for row in recorded if all(row[column] in kept for column, kept in layout.only.items())]
    side = next((column for column in SIDES if column in rows[0] and column not in layout.names), None)
    newest: dict[tuple[str, ...], dict[str, Row]] = {}  # a case that was measured again keeps its place
    for row in rows:
        newest.setdefault(tuple(row[column] for column in layout.names), {})[row[side] if side else ""] = row
    lines = []
    for names, sides in newest.items():
        cells = [(title, *((at, "") if isinstance(at, str) else at)) for title, at in layout.values.items()]
        lines.append([*map(_cell, names), *(_cell(value(sides[of], column), title) for title, column, of in cells)])
    shown = [row for sides in newest.values() for row in sides.values()]
    return f"{markdown(Table('', [*layout.names.values(), *layout.values], lines))}\n\n{_about(shown)}"


def _about(rows: Sequence[Row]) -> str:
    commits, machines = (", ".join(dict.fromkeys(row[column] for row in rows)) for column in ("commit", "machine"))
    releases = dict(package.split("=") for package in rows[-1]["versions"].split())
    versions = ", ".join(f"{name} {releases[name]}" for name in PACKAGES)
    return f"`{rows[-1]['command'].split(' --')[0]}` at commit {commits}, {machines}, {versions}."


def value(row: Row, column: str) -> str:
    """The cell of a column, with the range of its turns if there is one."""
    if column == "ratio" and row.get("lowest_ratio"):  # others write the range into the cell
        return "{:.2f} ({:.2f}-{:.2f})".format(
            *(float(row[name]) for name in ("ratio", "lowest_ratio", "highest_ratio"))
        )
    return row[column]


def _cell(text: str, title: str = "") -> str:
    return SPELLED.get(text) or readable(text, 100 if "%" in title else 1)

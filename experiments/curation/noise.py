"""Web-like noise on the built-in scenes, and how much of it a choice removes.

python experiments/curation/noise.py make SHARDS --share 0.3 --seed 0
python experiments/curation/noise.py judge SHARDS SELECTION --name likelihood --output choices.csv
"""

import argparse
import io
import json
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from PIL import Image

from coca_lit.data.scenes.render import scene_records
from coca_lit.data.shards.selection import read_selection
from coca_lit.data.shards.tar import tar_writer
from coca_lit.projects.curation.choose import write_selection
from coca_lit.runs.run_folder import environment
from experiments.study import replace_rows

PAIRS, PER_SHARD, SIZE = 6000, 1000, 32
QUALITY, COPY_SIZE = 75, 48  # of the near-duplicates, which are scaled up and compressed more


def make(folder: Path, share: float, seed: int) -> None:
    """Shards of `PAIRS` scenes, of which a share has the caption of another one, and as many near-duplicates of some of
    them; and the selection of those that have neither fault, clean.parquet.
    """
    rng = random.Random(f"noise {seed}")
    records = scene_records("train", SIZE, PAIRS)
    captions = [rng.choice(record.captions) for record in records]
    wrong = rng.sample(range(PAIRS), round(share * PAIRS))
    shifted = [captions[i] for i in [*wrong[1:], wrong[0]]]
    for i, caption in zip(wrong, shifted, strict=True):
        captions[i] = caption
    pairs = [(i, False) for i in range(PAIRS)] + [(i, True) for i in rng.sample(range(PAIRS), round(share * PAIRS))]
    rng.shuffle(pairs)
    clean: list[tuple[str, str]] = []
    folder.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(pairs), PER_SHARD)):
        with tar_writer(folder / f"{shard:05d}.tar") as tar:
            for row, (i, copied) in enumerate(pairs[start : start + PER_SHARD]):
                key = f"{shard:05d}{row:04d}"
                mismatched = captions[i] not in records[i].captions
                about = json.dumps({"scene": records[i].id, "mismatched": mismatched, "copy": copied})
                image = _jpeg(records[i].image(), copied)
                tar.write({"__key__": key, "jpg": image, "txt": captions[i].encode(), "json": about.encode()})
                if not (mismatched or copied):
                    clean.append((f"{shard:05d}.tar", key))
    shards, keys = zip(*clean, strict=True)
    write_selection(folder / "clean.parquet", [pa.record_batch({"shard": shards, "key": keys})], {"how": "the truth"})


def judge(folder: Path, selection: Path, share: float, name: str, seed: int, output: Path) -> None:
    """Adds a row to the CSV `output`: precision and recall of what the selection leaves out."""
    chosen = read_selection(selection)
    left: list[dict[str, object]] = []
    out: list[dict[str, object]] = []
    for path in sorted(folder.glob("*.tar")):
        keys = chosen.keys(path.name)
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json") and (file := tar.extractfile(member)):
                    (left if member.name.removesuffix(".json") in keys else out).append(json.load(file))
    scenes = {about["scene"] for about in left}
    # Of a scene and its copy either may stay: what matters is that one of them does.
    several = len(left) - len(scenes)
    missed = sum(bool(about["mismatched"]) for about in left)
    removed = sum(bool(about["mismatched"]) for about in out)
    facts = environment()
    row = {
        "noise": share,
        "seed": seed,
        "choice": name,
        "kept": len(left),
        "mismatches before": f"{(removed + missed) / (len(left) + len(out)):.4f}",
        "mismatches after": f"{missed / max(len(left), 1):.4f}",
        "mismatches found": f"{removed / max(removed + missed, 1):.4f}",
        "copies left": f"{several / max(len(left), 1):.4f}",
        **{key: facts[key] for key in ("commit", "torch", "machine")},
    }
    replace_rows(output, [row], by=("noise", "seed", "choice"))


def _jpeg(image: Image.Image, copied: bool) -> bytes:
    buffer = io.BytesIO()
    if copied:
        image = image.resize((COPY_SIZE, COPY_SIZE), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=QUALITY if copied else 95)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["make", "judge"])
    parser.add_argument("shards", type=Path)
    parser.add_argument("selection", type=Path, nargs="?")
    parser.add_argument("--share", type=float, default=0.3, help="of mismatched captions, and of near-duplicates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="", help="of the choice")
    parser.add_argument("--output", type=Path, help="CSV of the judgements")
    options = parser.parse_args(arguments)
    if options.action == "make":
        make(options.shards, options.share, options.seed)
    else:
        judge(options.shards, options.selection, options.share, options.name, options.seed, options.output)


if __name__ == "__main__":
    main()

"""Time and memory of `coca-data filter` on synthetic scores.

python experiments/curation/rows.py FOLDER --rows 100_000_000 --memory-gb 4
"""

import argparse
import resource
import time
from pathlib import Path

import duckdb

from coca_lit.projects.curation.choose import filter_scores
from coca_lit.projects.curation.scores import find_scores
from coca_lit.runs.run_folder import environment
from experiments.study import replace_rows

PER_SHARD = 10_000
RESULTS = Path(__file__).with_name("rows.csv")
WHERE, TOP, BY = "words > 2 AND aspect < 3", 0.3, "similarity"


def write(folder: Path, rows: int, per_file: int) -> None:
    """Files with the columns that a decoder's scores have, without embeddings."""
    folder.mkdir(parents=True, exist_ok=True)
    with duckdb.connect() as db:
        for start in range(0, rows, per_file):
            path = folder / f"{start // per_file:05d}.scores.parquet"
            if not path.exists():
                db.sql(
                    f"""SELECT printf('%05d.tar', i // {PER_SHARD}) AS shard, printf('%09d', i) AS key,
                    CAST(0.2 + 0.2 * (random() + random() + random() - 1.5) AS FLOAT) AS similarity,
                    CAST(-6 * random() AS FLOAT) AS likelihood, CAST(1 + 20 * random() AS INTEGER) AS words,
                    CAST(5 + 100 * random() AS INTEGER) AS characters, CAST(256 + 100 * random() AS INTEGER) AS width,
                    CAST(256 AS INTEGER) AS height, CAST(1 + 3 * random() AS FLOAT) AS aspect,
                    CAST(9e18 * (2 * random() - 1) AS BIGINT) AS phash
                    FROM range({start}, {min(start + per_file, rows)}) AS t(i)"""
                ).write_parquet(str(path), compression="zstd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--rows-per-file", type=int, default=PER_SHARD, help="of `coca-data score`: those of a shard")
    parser.add_argument("--memory-gb", type=float, default=4)
    options = parser.parse_args()
    write(options.folder, options.rows, options.rows_per_file)
    began = time.perf_counter()
    scores, output = find_scores([options.folder]), options.folder / "kept.parquet"
    found = filter_scores(scores, output, WHERE, TOP, BY, memory_gb=options.memory_gb)
    facts = environment()
    row = {
        "rows": options.rows,
        "files": len(scores),
        "GB of scores": f"{sum(path.stat().st_size for path in scores) / 1e9:.2f}",
        "memory limit, GB": options.memory_gb,
        "seconds to filter": f"{time.perf_counter() - began:.0f}",
        "peak memory, GB": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f}",
        "kept": found.kept,
        "GB of the selection": f"{output.stat().st_size / 1e9:.2f}",
        "duckdb": duckdb.__version__,
        **{key: facts[key] for key in ("commit", "torch", "machine")},
        "command": f"python experiments/curation/rows.py FOLDER --rows {options.rows} "
        f"--rows-per-file {options.rows_per_file}",
    }
    replace_rows(RESULTS, [row], by=["rows", "files"])
    print(row)


if __name__ == "__main__":
    main()

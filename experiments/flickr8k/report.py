"""python experiments/flickr8k/report.py [RUN_FOLDERS…]"""

from pathlib import Path

from experiments.study import by_seed, read_rows, report

RESULTS = Path(__file__).with_name("results.csv")


def tables() -> dict[str, str]:
    return {"flickr8k": by_seed(read_rows(RESULTS))}


if __name__ == "__main__":
    report(RESULTS, tables)

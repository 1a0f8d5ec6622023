"""python experiments/faults/report.py [RUN_FOLDERS…]"""

from pathlib import Path

from experiments.study import as_they_are, read_rows, report

RESULTS = Path(__file__).with_name("results.csv")


def tables() -> dict[str, str]:
    return {"faults": as_they_are(read_rows(RESULTS))}


if __name__ == "__main__":
    report(RESULTS, tables)

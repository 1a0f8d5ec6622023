"""Which numbers of the benchmarks have moved by more than noise since they were measured before on the same machine.

python experiments/benchmarks/moved.py
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from experiments.benchmarks.report import LAYOUTS, SIDES, Layout, recorded, value
from experiments.study import Row

NOISE = 0.05  # of a number, beside the range of its turns: what other programs and clock rates add


def main() -> None:
    found = [f"{name}: {line}" for name, layout in LAYOUTS.items() for line in moved(recorded(name), layout)]
    print("\n".join(found) if found else "nothing has moved")


def moved(rows: Sequence[Row], layout: Layout) -> Iterator[str]:
    """A line for each number whose newest range lies outside of the one before, and how many cases have none before."""
    columns = dict.fromkeys(at if isinstance(at, str) else at[0] for at in layout.values.values())
    alone = 0
    for case, of in _by_case(rows, layout).items():
        newest = of[-1]
        earlier = [row for row in of[:-1] if row["machine"] == newest["machine"]]
        if not earlier:
            alone += 1
            continue
        for column in columns:
            texts = [value(row, column) for row in (earlier[-1], newest)]
            before, now = map(_range, texts)
            if before is not None and now is not None and (now[0] > before[1] or now[1] < before[0]):
                yield f"{', '.join(case)}: {column} {texts[1]}, before {texts[0]} (commit {earlier[-1]['commit']})"
    if alone:
        yield f"{alone} cases were measured once on their machine"


def _by_case(rows: Sequence[Row], layout: Layout) -> Mapping[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    named = [*layout.names, *(side for side in SIDES if side not in layout.names)]
    for row in rows:
        if all(row[column] in kept for column, kept in layout.only.items()):
            case = tuple(row[column] for column in named if row.get(column))
            found.setdefault(case, []).append(row)
    return found


def _range(text: str) -> tuple[float, float] | None:
    """Of "2.6 (2.4-2.7)" or of a number alone, with noise; None for other text."""
    number = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
    found = re.fullmatch(rf"({number})(?: \(({number})-({number})\))?", text)
    if found is None:
        return None
    low, high = float(found[2] or found[1]), float(found[3] or found[1])
    return low * (1 - NOISE), high * (1 + NOISE)


if __name__ == "__main__":
    main()

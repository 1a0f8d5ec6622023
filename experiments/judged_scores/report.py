"""Tables and figure of judged_scores: which scores people agree with, and what a difference of CIDEr means."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coca_lit.projects.judgments.evaluation import OF_MODEL
from coca_lit.runs.scores import NAMES
from experiments.judged_scores.judge import ALL, BASE, PUBLISHED
from experiments.study import Row, mean_std, read_rows, with_about

RESULTS = Path(__file__).with_name("results.csv")
USUAL = {"experts": "tau_c", "crowd": "tau_b"}  # as in papers
TITLES = {"experts": "experts, tau-c", "crowd": "crowd, tau-b"}
NOT_TABLED = ("likelihood", "pmi", "Bleu_1", "CIDEr_plain")  # in the figure and the CSV alone
FEWEST = 30  # pairs of captions behind a line


def tables() -> dict[str, str]:
    rows = read_rows(RESULTS)
    if not rows:
        return {}
    return {"judged_scores": _scores(rows), "judged_scores/cider": _differences(rows)}


def _name(row: Row) -> str:
    name = NAMES.get(row["score"], row["score"])
    if row["model"] and (row["score"] in OF_MODEL or " + " in row["score"]):
        name = f"{name}{_variant(row)}"
    return name


def _variant(row: Row) -> str:
    return f", {re.sub(r'_seed[0-9]+$', '', row['model'])}"


def _recorded(rows: Sequence[Row]) -> list[str]:
    """The judgements that there are rows of."""
    return [data for data in TITLES if any(row["judgments"] == data for row in rows)]


def _by_name(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Score, with its model if it has one -> judgements -> rows, which differ in the seed of the model."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["measure"] == USUAL[row["judgments"]]:
            name = _name(row)
            own = groups.setdefault(name, {}).setdefault(row["judgments"], [])
            if not own or name.endswith(_variant(row)):  # scores without a model are repeated for every model
                own.append(row)
    return groups


def _value(own: Sequence[Row], ends: tuple[str, str, str]) -> str:
    """A value with its interval, or mean ± standard deviation over several seeds."""
    middle, low, high = ends
    values = [float(row[middle]) for row in own if row.get(middle)]
    if not values:
        return ""
    if len(values) > 1:
        return mean_std(values)
    return f"{values[0]:.1f} [{float(own[0][low]):.1f}, {float(own[0][high]):.1f}]"


VALUE, GAP = ("value", "low", "high"), ("minus_cider", "minus_low", "minus_high")


def _scores(rows: Sequence[Row]) -> str:
    shown = [row for row in rows if row["images"] == ALL and not row["score"].startswith(NOT_TABLED)]
    lines = []
    for name, by_data in _by_name(shown).items():
        line = [name, str(max(map(len, by_data.values()))) if by_data[next(iter(by_data))][0]["model"] else ""]
        for data in _recorded(shown):
            own = by_data.get(data, [])
            line += [_value(own, VALUE), _noise(own)]
        lines.append(line)
    header = ["score", "seeds"]
    for title in map(TITLES.__getitem__, _recorded(shown)):
        header += [title, "minus CIDEr"]
    return with_about(header, lines, shown)


def _noise(own: Sequence[Row]) -> str:
    noise = " (noise)" if len(own) == 1 and own[0]["p"] and float(own[0]["p"]) >= 0.05 else ""
    return _value(own, GAP) + noise


def _differences(rows: Sequence[Row]) -> str:
    measures = ("right, ", "higher by, ")
    shown = [row for row in rows if row["score"] == BASE and row["measure"].startswith(measures)]
    lines = []
    for (score, limits), own in _bins(shown).items():
        if int(own["right"]["count"]) < FEWEST:
            continue
        low, _, high = limits.partition(" to ")
        where = f"above {low}" if high == "inf" else f"{low} to {high}"
        right, gap = own["right"], own["higher by"]
        grade = " ".join((f"{float(gap['value']) / 100:.2f}", f"[{_hundredth(gap['low'])}, {_hundredth(gap['high'])}]"))
        lines.append([NAMES.get(score, score), where, f"{int(right['count']):,}", _value([right], VALUE), grade])
    header = ["score", "difference", "pairs of captions", "people prefer the higher, %", "its grade is higher by"]
    return with_about(header, lines, shown)


def _hundredth(text: str) -> str:
    return f"{float(text) / 100:.2f}"


def _bins(rows: Sequence[Row]) -> Mapping[tuple[str, str], dict[str, Row]]:
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        what, _, limits = row["measure"].partition(", ")
        found.setdefault((row["score"], limits), {})[what] = row
    return found


def draw() -> None:
    """Each score's agreement with its interval, beside that of CIDEr and of people."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = [row for row in read_rows(RESULTS) if row["images"] == ALL]
    groups = _by_name(rows)
    recorded = _recorded(rows)
    shape: dict[str, Any] = {"squeeze": False, "layout": "constrained", "sharey": True}
    figure, ((*axes,),) = plt.subplots(
        1, len(recorded), figsize=(3 + 3 * len(recorded), 1 + 0.28 * len(groups)), **shape
    )
    for axis, data in zip(axes, recorded, strict=True):
        for place, by_data in enumerate(groups.values()):
            for row in by_data.get(data, []):
                value, low, high = (float(row[column]) for column in VALUE)
                colour = "tab:grey" if row["score"] == "people" else "tab:orange" if row["model"] else "tab:blue"
                axis.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=2)
                if row["score"] == BASE:
                    axis.axvspan(low, high, color="0.9", zorder=0)
                known = PUBLISHED[data].get(row["score"])
                if known is not None and not row["model"]:
                    axis.plot(known, place, "x", color="black", zorder=5)
        axis.set_title(f"{TITLES[data]}, times 100", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes[0].invert_yaxis()
    figure.savefig(RESULTS.with_name("judged_scores.png"), dpi=110)
    plt.close(figure)

"""Tables and figures of the family: scores of its members at equal steps and at equal seconds.

A run of member M with seed N on data D is named D_M_seedN. Seconds are the cost of a step in costs.csv times the
steps: CPU seconds of training on one thread, without scoring.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from experiments.study import Row, by_variant, read_rows, renamed, unit, variants, write_rows

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.csv"
CURVES = FOLDER / "curves.csv"
MEMBERS = {
    "coca": "CoCa",
    "coca2": "CoCa2 classic",
    "coca2_modern": "CoCa2 modern",
    "mammut": "MaMMUT",
    "captioner": "captions alone",
    "cappa": "CapPa",
}
UNTRAINED = ("captioner", "cappa")  # their cosines mean nothing
RECALL = {"t2i_recall@1": "t→i R@1", "i2t_recall@1": "i→t R@1"}
SCORES = {  # of the tables; the CSV has more
    "scenes": {
        "scenes/CIDEr": "CIDEr",
        **{f"scenes/{score}": title for score, title in RECALL.items()},
        "scenes/top1": "zero-shot top-1",
    },
    "flickr8k": {
        "flickr8k/CIDEr": "CIDEr",
        **{f"flickr8k/{score}": title for score, title in RECALL.items()},
    },
}
ALONG = {  # scores that curves have, in the figures the first two
    "scenes": ("scenes/CIDEr", "scenes/t2i_recall@1", "scenes/exact_match", "scenes/i2t_recall@1"),
    "flickr8k": ("flickr8k/CIDEr", "flickr8k/t2i_recall@1", "flickr8k/Bleu_4", "flickr8k/i2t_recall@1"),
}
MARKERS = "osD^vP"
Points = list[tuple[int, float]]  # of a curve: steps, score


def add_curves(folders: Sequence[Path]) -> None:
    """Adds what the runs scored on their way to curves.csv, in place of earlier rows of the same runs."""
    new = [row for folder in folders for row in _points(folder)]
    names = {folder.name for folder in folders}
    write_rows(CURVES, sorted([*(r for r in read_rows(CURVES) if r["run"] not in names), *new], key=lambda r: r["run"]))


def _points(folder: Path) -> list[Row]:
    """A row for each step after which there are scores; `metrics.csv` counts steps from 0, at the end from 1."""
    scores = ALONG[folder.name.partition("_")[0]]
    found: dict[int, Row] = {}
    for row in read_rows(folder / "metrics.csv"):
        if kept := {name: f"{float(row[name]):.4f}" for name in scores if row.get(name)}:
            step = -(-int(row["step"]) // 10) * 10
            found.setdefault(step, {"run": folder.name, "step": str(step)}).update(kept)
    return [found[step] for step in sorted(found)]


def tables() -> dict[str, str]:
    found = {}
    for data, scores in SCORES.items():
        if rows := rows_of(data):
            rows = with_equal_seconds(data, rows)
            seconds = {f"seconds/{name}": f"{scores[name]}, equal seconds" for name in ALONG[data][:2]}
            found[f"family/{data}"] = by_variant(renamed(rows, MEMBERS), scores | seconds)
    return found


def costs(data: str) -> list[Row]:
    rows = [row for row in read_rows(FOLDER / "costs.csv") if row["data"] == data]
    return sorted(rows, key=lambda row: [*MEMBERS].index(row["member"]))


def seconds_per_step(data: str) -> dict[str, float]:
    return {row["member"]: float(row["seconds"]) for row in costs(data)}


def rows_of(data: str) -> list[Row]:
    """Finished runs on the data, each named after its member and its seed."""
    return [row for row in _named_after_members(read_rows(RESULTS), data) if row.get(f"{data}/CIDEr")]


def _named_after_members(rows: Sequence[Row], data: str) -> list[Row]:
    """The rows of runs on the data, without scores of cosines that nothing has trained."""
    found = [row | {"run": row["run"].removeprefix(f"{data}_")} for row in rows if row["run"].startswith(f"{data}_")]
    for row in found:
        if row["run"].startswith(UNTRAINED):
            row.update({score: "" for score in row if _of_cosines(score)})
    return found


def _of_cosines(score: str) -> bool:
    by_decoder = any(way in score for way in ("decoder", "likelihood", "pmi"))
    return score.endswith(("/top1", "_recall@1")) and not by_decoder


def curves(data: str) -> dict[str, dict[str, Points]]:
    """{run: {score: points}}"""
    found: dict[str, dict[str, Points]] = {}
    for row in _named_after_members(read_rows(CURVES), data):
        for score in ALONG[data]:
            if row.get(score):
                found.setdefault(row["run"], {}).setdefault(score, []).append((int(row["step"]), float(row[score])))
    return found


def with_equal_seconds(data: str, rows: Sequence[Row]) -> list[Row]:
    """The rows, and as `seconds/SCORE` the scores that each run had when the cheapest member was through."""
    per_step, lines = seconds_per_step(data), curves(data)
    limit = equal_seconds(data)
    found = []
    for row in rows:
        steps = limit / per_step[next(iter(variants([row])))]
        scores = lines[row["run"]].items()
        found.append(row | {f"seconds/{score}": f"{between(points, steps):.4f}" for score, points in scores})
    return found


def equal_seconds(data: str) -> float:
    """CPU seconds in which the cheapest member takes all its steps."""
    last = max(step for scores in curves(data).values() for points in scores.values() for step, _ in points)
    return last * min(seconds_per_step(data).values())


def between(points: Points, steps: float) -> float:
    """The score after so many steps, on straight lines between the points; before the first one from 0."""
    before = (0, 0.0)
    for step, score in points:
        if steps <= step:
            return before[1] + (score - before[1]) * (steps - before[0]) / (step - before[0])
        before = (step, score)
    return before[1]


def draw() -> None:
    """Captions above, retrieval below; against steps on the left, against seconds on the right. Of several seeds, each
    is a pale line and their mean a strong one.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    for data, (captions, retrieval, *_) in ALONG.items():
        if not (lines := curves(data)) or not costs(data):
            continue
        figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex="col", sharey="row", layout="constrained")
        for y, score in enumerate((captions, retrieval)):
            for i, (member, title) in enumerate(MEMBERS.items()):
                runs = [scores[score] for run, scores in lines.items() if _member(run) == member and score in scores]
                for x, each in enumerate((1.0, seconds_per_step(data)[member])):
                    for points in runs if len(runs) > 1 else []:
                        axes[y, x].plot([s * each for s, _ in points], [100 * v for _, v in points], f"C{i}", alpha=0.2)
                    if runs:
                        means = mean_points(runs)
                        place = [s * each for s, _ in means], [100 * v for _, v in means]
                        axes[y, x].plot(*place, f"C{i}", marker=MARKERS[i], label=title)
            axes[y, 0].set_ylabel(unit(score, SCORES[data][score]))
        axes[1, 0].set_xlabel("steps of 64 pairs")
        axes[1, 1].set_xlabel("CPU seconds of training")
        for axis in axes.flat:
            axis.grid(alpha=0.3)
        for axis in axes[:, 1]:
            axis.axvline(equal_seconds(data), color="grey", linestyle=":", label="equal seconds")
        axes[0, 0].legend(fontsize=8)
        axes[0, 1].legend(handles=axes[0, 1].lines[-1:], fontsize=8)
        figure.savefig(FOLDER / f"{data}.png", dpi=110)
        plt.close(figure)


def _member(run: str) -> str:
    return run.rpartition("_seed")[0]


def mean_points(runs: Sequence[Points]) -> Points:
    """Means over the runs, of the steps that all of them have reached."""
    by_step: Mapping[int, list[float]] = {step: [] for step, _ in runs[0]}
    for points in runs:
        for step, value in points:
            by_step.get(step, []).append(value)
    return [(step, mean(values)) for step, values in by_step.items() if len(values) == len(runs)]

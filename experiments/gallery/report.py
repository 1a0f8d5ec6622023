"""Tables and figures of the gallery: each method of a project beside plain CoCa, on scenes and photos.

A run of variant V with seed N on data D is named D_V_seedN. Tables and figures are named after the project. How well
semantic scores agree with people is in semantic.csv, see `experiments.gallery.semantic`.
"""

import io
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coca_lit.runs.scores import score_name
from coca_lit.tools.report.tables import Table, markdown
from experiments.study import (
    Row,
    by_variant,
    draw_variants,
    mean_std,
    numbers,
    read_rows,
    renamed,
    unit,
    variants,
    with_about,
)

FOLDER = Path(__file__).resolve().parent
PACKAGE = FOLDER.parents[1] / "coca_lit" / "projects"
NOT_CODE = (*(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),)
METHODS = {
    "superclip": {
        f"{variant}_{size}": f"{name}, batches of {size}"
        for size in (16, 64, 256)
        for variant, name in (("coca", "CoCa"), ("superclip", "SuperCLIP"))
    },
    "token_dropping": {
        "coca_64": "both losses, all tokens",
        **{f"dropping_{share}": f"both losses, {share} of the tokens" for share in ("0.5", "0.35", "0.2")},
        "captions_64": "captions alone, all tokens",
        **{f"captions_dropping_{share}": f"captions alone, {share} of the tokens" for share in ("0.5", "0.35", "0.2")},
    },
    "flair": {
        "siglip_64": "sigmoid loss, one caption",
        "siglip_all_captions": "sigmoid loss, several captions",
        "flair": "FLAIR, several captions",
    },
    "caption_sampling": {
        "coca_64": "one of five captions",
        "all_captions": "all five captions",
        "merged_captions": "two captions in one text",
    },
    "middle_layers": {f"layer_{layer}": f"until layer {layer}" for layer in (4, 3, 2)},
    "fact_reward": {
        "after_captions": "100 steps more of captions",
        "after_cider": "100 steps of CIDEr-D",
        "after_facts": "100 steps of facts",
    },
}
PROJECTS = {  # each with its question
    "superclip": "Does naming the caption's words soften small batches?",
    "flair": "Does an image that each text pools for itself retrieve better?",
    "token_dropping": "Does a decoder that sees a third of the image learn as well?",
    "caption_sampling": "One caption of an image in a step, all, or merged ones?",
    "middle_layers": "Which layer of an encoder serves best?",
    "fact_reward": "Does a reward for facts make captions truer than CIDEr?",
    "semantic_score": "Does a sentence encoder agree with people better than CIDEr?",
}
JUDGED = ("CIDEr", "SPICE", "semantic_best", "semantic_mean")  # of the scores, in the table
JUDGES = {"experts": ("experts, tau-c", "tau_c"), "crowd": ("crowd, tau-b", "tau_b")}  # as in papers
WITHOUT_COSINES = "captions_"  # nothing has trained the cosines of these variants
ARROWS = {"t2i": "t→i", "i2t": "i→t"}
SCORES = {  # in the tables; the CSV has all
    "scenes": {
        "scenes/CIDEr": "CIDEr",
        "scenes/t2i_recall@1": "t→i R@1",
        "scenes/i2t_recall@1": "i→t R@1",
        "scenes/top1": "zero-shot top-1",
    },
    "flickr8k": {
        "flickr8k/CIDEr": "CIDEr",
        "flickr8k/t2i_recall@1": "t→i R@1",
        "flickr8k/i2t_recall@1": "i→t R@1",
    },
}
FACTS = {
    "scenes/CIDEr": "CIDEr",
    "scenes/exact_match": "exact captions",
    **{f"scenes_facts/{fact}_precision": f"{fact}s right" for fact in ("object", "attribute", "relation")},
}
POOLED = {
    **{f"{{data}}_flair/reranked_{way}_recall@1": f"{arrow} R@1, pooled" for way, arrow in ARROWS.items()},
    **{f"{{data}}_decoder/reranked_{way}_recall@1": f"{arrow} R@1, decoder" for way, arrow in ARROWS.items()},
}
NUMBERS = {  # score, variant and the variant that it is compared with
    "superclip": ("flickr8k/CIDEr", "superclip_64", "coca_64"),
    "flair": ("scenes/t2i_recall@1", "flair", "siglip_64"),
    "token_dropping": ("flickr8k/CIDEr", "captions_dropping_0.35", "captions_64"),
    "caption_sampling": ("flickr8k/CIDEr", "all_captions", "coca_64"),
    "middle_layers": ("flickr8k/CIDEr", "layer_3", "layer_4"),
    "fact_reward": ("scenes/exact_match", "after_facts", "after_captions"),
}
RECIPES = {  # of Flickr8k: the study with its runs, the variants of which each goes on where the one before ends
    "10 epochs": ("flickr8k_two_hours", ["short"]),
    "20 epochs": ("flickr8k_two_hours", ["captions"]),
    "40 epochs": ("flickr8k_two_hours", ["long"]),
    "40 epochs, mixed reward": ("flickr8k_two_hours", ["long", "long_mixed_rewards"]),
    "experiment=flickr8k": ("flickr8k", ["flickr8k"]),
}
DRAWN = {
    "scenes/CIDEr": "CIDEr, scenes",
    "scenes/t2i_recall@1": "t→i R@1, scenes",
    "flickr8k/CIDEr": "CIDEr, photos",
    "flickr8k/t2i_recall@1": "t→i R@1, photos",
}


def tables() -> dict[str, str]:
    found = {"gallery": overview(), "gallery/minutes": minutes_table()}
    judged = read_rows(FOLDER / "semantic.csv")
    if judged:
        found["semantic_score/judgments"] = agreement_with_people(judged)
    for method, names in METHODS.items():
        for data in SCORES:
            rows = renamed(rows_of(data), names)
            if len(variants(rows)) > 1:  # methods share the plain CoCa
                found[f"{method}/{data}"] = by_variant(rows, scores_of(method, data))
    return found


def scores_of(method: str, data: str) -> dict[str, str]:
    """The columns of a method's table, {score: title}."""
    if method == "fact_reward":
        return FACTS
    of_pooling = {score.format(data=data): title for score, title in POOLED.items()} if method == "flair" else {}
    return SCORES[data] | of_pooling


def overview() -> str:
    """A line for each method: its question, its number and the lines of its code."""
    lines = [
        [linked(name), question, number(name), str(code_lines(PACKAGE / name))] for name, question in PROJECTS.items()
    ]
    return markdown(Table("", ["project", "question", "number", "lines of code"], lines))


def linked(name: str) -> str:
    return f"[`{name}`](../coca_lit/projects/{name}/README.md)"


def number(name: str) -> str:
    """The score that answers a method's question, and that of what it is compared with."""
    if name == "semantic_score":
        taus = {row["score"]: row["value"] for row in expert_taus()}
        return f"tau-c {float(taus['semantic_best']):.1f} (CIDEr {float(taus['CIDEr']):.1f})" if taus else "not run"
    score, variant, other = NUMBERS[name]
    groups = variants(rows_of(score.partition("/")[0]))
    values = [numbers(groups.get(run, []), score) for run in (variant, other)]
    if not all(values):
        return "not run"
    seeds = min(map(len, values))
    own, compared = (mean_std(of_variant) for of_variant in values)
    title = (DRAWN | FACTS)[score].partition(",")[0]
    return f"{unit(score, title)} {own} ({METHODS[name][other]}: {compared}), {seeds} seed{'s' * (seeds > 1)}"


def expert_taus() -> list[Row]:
    rows = read_rows(FOLDER / "semantic.csv")
    return [row for row in rows if (row["judgments"], row["measure"]) == ("experts", JUDGES["experts"][1])]


def code_lines(folder: Path) -> int:
    """Lines of a project's modules that hold code: neither blank, nor comments, nor docstrings."""
    count = 0
    for module in sorted(folder.glob("*.py")):
        lines: set[int] = set()
        before = tokenize.NEWLINE
        for token in tokenize.generate_tokens(io.StringIO(module.read_text()).readline):
            is_docstring = token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT)
            if token.type not in NOT_CODE and not is_docstring:
                lines.update(range(token.start[0], token.end[0] + 1))
            if token.type not in (tokenize.NL, tokenize.COMMENT):
                before = token.type
        count += len(lines)
    return count


def agreement_with_people(rows: list[Row]) -> str:
    """A line for each score: Kendall's tau with the grades, and the difference from CIDEr on the same draws."""
    header = ["score"]
    for title, _ in JUDGES.values():
        header += [title, "minus CIDEr"]
    lines = []
    for score in JUDGED:
        line = [score_name(score)]
        for judges, (_, measure) in JUDGES.items():
            own = next(r for r in rows if (r["judgments"], r["measure"], r["score"]) == (judges, measure, score))
            line.append(interval(own, "value", "low", "high"))
            line.append(interval(own, "minus_cider", "minus_low", "minus_high"))
        lines.append(line)
    return with_about(header, lines, rows)


def interval(row: Row, middle: str, low: str, high: str) -> str:
    if not row[middle]:
        return ""
    return f"{float(row[middle]):.1f} [{float(row[low]):.1f}, {float(row[high]):.1f}]"


def draw() -> None:
    for method, names in METHODS.items():
        rows = [row for data in SCORES for row in renamed(rows_of(data), names)]
        wanted = FACTS if method == "fact_reward" else DRAWN
        drawn = {score: title for score, title in wanted.items() if any(row.get(score) for row in rows)}
        if len(variants(rows)) > 1:
            draw_variants(rows, drawn, FOLDER / f"{method}.png")
    draw_taus(expert_taus())
    draw_minutes()


def draw_taus(rows: Sequence[Row]) -> None:
    """Agreement with the experts, a dot with its interval for each score."""
    figure, axis = new_figure(3)
    for place, row in enumerate(rows):
        value, low, high = (float(row[column]) for column in ("value", "low", "high"))
        axis.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color="tab:blue")
    axis.set_yticks(range(len(rows)), [score_name(row["score"]) for row in rows], fontsize=8)
    axis.set_xlabel("tau-c with experts")
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    figure.savefig(FOLDER / "semantic_score.png", dpi=110)


def draw_minutes() -> None:
    """CIDEr against minutes, a dot for each finished run of a recipe."""
    figure, axis = new_figure(3.2)
    for recipe in RECIPES:
        axis.plot(*zip(*minutes_and_scores(recipe), strict=True), "o", label=recipe)
    axis.plot(30, 50, "k*", label="aim: 50 within 30 minutes")
    axis.set(xlabel="minutes, scoring included", ylabel="CIDEr", xlim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(FOLDER / "minutes.png", dpi=110)


def new_figure(height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(6, height), layout="constrained")


def minutes_table() -> str:
    lines = []
    for recipe in RECIPES:
        points = minutes_and_scores(recipe)
        minutes, scores = (mean_std(values) for values in zip(*points, strict=True))
        lines.append([recipe, str(len(points)), minutes, scores])
    return markdown(Table("", ["recipe", "n", "minutes", "CIDEr"], lines))


def minutes_and_scores(recipe: str) -> list[tuple[float, float]]:
    """Of each seed of a recipe whose time is known, from the first run to the last."""
    study, names = RECIPES[recipe]
    groups = variants(read_rows(FOLDER.parent / study / "results.csv"))
    points: list[tuple[float, float]] = []
    for last in groups[names[-1]]:
        runs = [row for name in names for row in groups[name] if row["seed"] == last["seed"]]
        if all(row["seconds"] for row in runs):
            (score,) = numbers([last], "flickr8k/CIDEr")
            points.append((sum(float(row["seconds"]) for row in runs) / 60, score))
    return points


def rows_of(data: str) -> list[Row]:
    """Finished runs on the data, each named after its variant and its seed."""
    found: list[Row] = []
    for row in read_rows(FOLDER / "results.csv"):
        if row["run"].startswith(f"{data}_") and row.get(f"{data}/CIDEr"):
            found.append(without_cosines(row | {"run": row["run"].removeprefix(f"{data}_")}))
    return found


def without_cosines(row: Row) -> Row:
    if not row["run"].startswith(WITHOUT_COSINES):
        return row
    return {name: "" if of_cosines(name) else value for name, value in row.items()}


def of_cosines(score: str) -> bool:
    by_decoder = any(way in score for way in ("decoder", "likelihood", "pmi"))
    return score.endswith(("/top1", "_recall@1")) and not by_decoder

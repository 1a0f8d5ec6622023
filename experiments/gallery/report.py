"""Tables and figures of the gallery: each method of a project beside plain CoCa, on scenes and photos.

A run of variant V with seed N on data D is named D_V_seedN. Tables and figures are named after the project. How well
semantic scores agree with people is in semantic.csv, see `experiments.gallery.semantic`.
"""

import io
import tokenize
from pathlib import Path

from coca_lit.runs.scores import score_name
from coca_lit.tools.report.tables import Table, markdown
from experiments.study import Row, by_variant, draw_variants, read_rows, renamed, with_about

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
JUDGES = {"experts": ("experts, tau-c", "tau_c"), "crowd": ("crowd, tau-b", "tau_b")}  # as in papers
WITHOUT_COSINES = "captions"  # nothing has trained the cosines of these variants
SCORES = {
    "scenes": {
        "scenes/CIDEr": "CIDEr",
        "scenes/exact_match": "exact captions",
        "scenes/t2i_recall@1": "t→i R@1",
        "scenes/i2t_recall@1": "i→t R@1",
        "scenes/top1": "zero-shot top-1",
        "scenes/likelihood/top1": "zero-shot by likelihood",
    },
    "flickr8k": {
        "flickr8k/CIDEr": "CIDEr",
        "flickr8k/Bleu_4": "BLEU-4",
        "flickr8k/t2i_recall@1": "t→i R@1",
        "flickr8k/i2t_recall@1": "i→t R@1",
    },
}
DRAWN = {
    "scenes/CIDEr": "CIDEr, scenes",
    "scenes/t2i_recall@1": "t→i R@1, scenes",
    "flickr8k/CIDEr": "CIDEr, photos",
    "flickr8k/t2i_recall@1": "t→i R@1, photos",
}


def tables() -> dict[str, str]:
    found = {"gallery": overview()}
    judged = read_rows(FOLDER / "semantic.csv")
    if judged:
        found["semantic_score/judgments"] = agreement_with_people(judged)
    for method, names in METHODS.items():
        for data, scores in SCORES.items():
            rows = renamed(rows_of(data), names)
            if rows:
                found[f"{method}/{data}"] = by_variant(rows, scores)
    return found


def overview() -> str:
    """A line for each project: its question, the lines of its code, and its page."""
    lines = [
        [f"[`{name}`](../../coca_lit/projects/{name}/README.md)", question, str(code_lines(PACKAGE / name))]
        for name, question in PROJECTS.items()
    ]
    return markdown(Table("", ["project", "question", "lines of code"], lines))


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
    for score in dict.fromkeys(row["score"] for row in rows):
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
        drawn = {score: title for score, title in DRAWN.items() if any(row.get(score) for row in rows)}
        if drawn:
            draw_variants(rows, drawn, FOLDER / f"{method}.png")


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

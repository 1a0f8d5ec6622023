"""Tables and figures of the gallery: each method of a project beside plain CoCa, on scenes and photos.

A run of variant V with seed N on data D is named D_V_seedN. Tables and figures are named after the project.
"""

from pathlib import Path

from experiments.study import Row, by_variant, draw_variants, read_rows, renamed

FOLDER = Path(__file__).resolve().parent
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
    found = {}
    for method, names in METHODS.items():
        for data, scores in SCORES.items():
            rows = renamed(rows_of(data), names)
            if rows:
                found[f"{method}/{data}"] = by_variant(rows, scores)
    return found


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

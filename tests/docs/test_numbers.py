"""What pages say of a study agrees with its recorded results, whichever page says it.

The tables of the studies are written from their CSVs, and `tests/experiments` compares them. Here each sentence that
quotes them is compared with the cells that it rounds.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments.study import PAGES

ROOT = Path(__file__).resolve().parents[2]
FRONT, STUDIES = "README.md", "experiments/README.md"
LOSSES, MODELS = "experiments/losses.md", "experiments/models.md"
RERANKING, TWO_CORES = "experiments/reranking.md", "experiments/two_cores.md"
TABLE = re.compile(r"<!-- table:(\S+) -->\n(.*?)<!-- /table -->", re.DOTALL)


class Cell(NamedTuple):
    """A cell of a table, by the first cells of its row and the title of its column."""

    table: str
    row: str
    column: str


class Claim(NamedTuple):
    pages: tuple[str, ...]  # below experiments/, or a path with a suffix
    sentence: str  # a regular expression with a group for each number; a space stands for any white space
    cells: tuple[Cell, ...]


def cells(table: str, column: str, *rows: str) -> tuple[Cell, ...]:
    return tuple(Cell(table, row, column) for row in rows)


def re_ranked(column: str) -> tuple[Cell, ...]:
    return cells("decoder_reranking/weights", column, "photos | 0.0", "photos | 0.7")


RE_RANKED = (*re_ranked("i→t R@1, %"), *re_ranked("t→i R@1, %"))
MEMBERS = (
    *cells("family/scenes", "CIDEr", "captions alone", "CoCa"),
    *cells("family/flickr8k", "CIDEr", "captions alone", "CoCa"),
)
MAMMUT = tuple(
    Cell(f"family/{data}", name, "t→i R@1, %") for name in ("MaMMUT", "CoCa") for data in ("scenes", "flickr8k")
)
BEST = "40 epochs, mixed SCST, best of 8 beams, 288 px"
FASTER = "times as fast"
CLAIMS = [
    Claim(
        (FRONT, STUDIES, RERANKING),
        r"from (\S+) to (\S+) % \(image to text\) and from (\S+) to (\S+) % \(text to image\)",
        RE_RANKED,
    ),
    Claim(
        (TWO_CORES,),
        r"weight 0.7 the model before the reward training reaches \[(\S+) and (\S+) %",
        (RE_RANKED[1], RE_RANKED[3]),
    ),
    Claim(
        (RERANKING,),
        r"text to image recall@1 from (\d+) to (\d+) %, on unseen combinations from (\d+) to (\d+) %",
        (
            *cells("decoder_reranking", "t→i R@1, %", "scenes | 0", "scenes | 2"),
            *cells("decoder_reranking", "t→i R@1, %", "unseen combinations | 0", "unseen combinations | 2"),
        ),
    ),
    Claim(
        (RERANKING,),
        r"(\d+) → (\d+) % right on unseen combinations",
        cells(
            "decoder_reranking/choices",
            "all, %",
            "unseen combinations | 0.0",
            "unseen combinations | 0.2",
        ),
    ),
    Claim(
        (FRONT, "benchmarks"),
        r"(\S+) times \(fp32\) to (\S+) times \(bf16\) faster",
        cells("benchmarks/train_step", FASTER, "fp32, batch 16", "bf16, batch 16"),
    ),
    Claim(
        (FRONT,),
        r"and (\S+) times with full-length ones",
        cells("benchmarks/train_step", FASTER, "fp32, batch 16, full captions"),
    ),
    Claim(
        (FRONT, "benchmarks"),
        r"(?i)beam search (?:on eight images is )?(\d+) times faster",
        cells("benchmarks/generation", "fp32, times as fast", "beam | 8"),
    ),
    Claim(("benchmarks",), r"greedy (\S+) times", cells("benchmarks/generation", "fp32, times as fast", "greedy | 8")),
    Claim(
        ("benchmarks",),
        r"\*\*Input pipeline\*\*: (\S+) to (\S+) times faster",
        cells(
            "benchmarks/input_pipeline",
            FASTER,
            "synthetic photos, short side 256-512 | all, indexed shards",
            "photos in images | all, indexed shards",
        ),
    ),
    Claim((MODELS,), r"CIDEr (\d+) instead of (\d+) on scenes, (\d+) instead of (\d+) on photos", MEMBERS),
    Claim(
        (MODELS,),
        r"recall@1 (?:of )?(\d+) % on scenes and (\d+) % on photos[ ,(]+CoCa (\d+) and (\d+) %",
        MAMMUT,
    ),
    Claim(
        (STUDIES, MODELS), r"\(?CIDEr (\d+), CoCa (\d+)\)", cells("family/flickr8k", "CIDEr", "CoCa2 modern", "CoCa")
    ),
    Claim((STUDIES, LOSSES), r"raises CIDEr from (\d+) to (\d+)", cells("loss_weights", "CIDEr", "1 : 2", "1 : 4")),
    Claim(
        (STUDIES, LOSSES),
        r"side by side(?: raise CIDEr|: CIDEr rises) from (\d+) to (\d+)",
        cells("negative", "CIDEr", "as it is", "two poolers side by side"),
    ),
    Claim(
        (STUDIES, LOSSES),
        r"lower mean CIDEr from (\d+) to between (\d+) and (\d+)",
        cells("negative", "CIDEr", "few pairs: alone", "few pairs: both", "few pairs: texts first"),
    ),
    Claim(
        (STUDIES, RERANKING),
        r"self-critical training from (\S+) to (\S+) \(two|CIDEr on photos from (\S+) to (\S+) \(two",
        tuple(
            Cell("contrastive_reranking/flickr8k", "CIDEr | two hours, SCST | 8 beams", f"weight {w}")
            for w in ("0.0", "0.2")
        ),
    ),
    Claim((STUDIES,), r"LoRA keeps (\d+) %", cells("forgetting", "R@5 kept, %", "weight 0, LoRA in towers and pooler")),
    Claim(
        (STUDIES, TWO_CORES),
        r"CIDEr (\d+), BLEU-4 (\S+?),? and recall@1 of|CIDEr (\d+), BLEU-4 (\S+?), recall@1 of",
        (Cell("flickr8k", "experiment=flickr8k", "CIDEr"), Cell("flickr8k", "experiment=flickr8k", "BLEU-4")),
    ),
    Claim(
        (STUDIES, TWO_CORES),
        r"recall@1 of (\d+) % \(text to image\) and (\d+) % \(image to text\)",
        (
            Cell("flickr8k", "experiment=flickr8k", "text to image R@1, %"),
            Cell("flickr8k", "experiment=flickr8k", "image to text R@1, %"),
        ),
    ),
    Claim(
        (STUDIES, TWO_CORES),
        r"CIDEr (\S+), BLEU-4 (\S+)(?:,| and) METEOR (\S+)",
        tuple(Cell("flickr8k_two_hours", BEST, score) for score in ("CIDEr", "BLEU-4", "METEOR")),
    ),
    Claim(
        (TWO_CORES,),
        r"one seed of such a model reaches CIDEr (\S+), METEOR (\S+) and BLEU-4 (\S+)\. All",
        tuple(
            Cell("flickr8k_two_hours", "40 epochs again, mixed SCST, consensus of 8 beams", score)
            for score in ("CIDEr", "METEOR", "BLEU-4")
        ),
    ),
    Claim(
        (TWO_CORES,),
        r"its recall@1 is (\S+) % \(image to text\) and (\S+) % \(text to image\)",
        tuple(
            Cell("flickr8k_two_hours/retrieval", "40 epochs, mixed SCST, 16 re-ranked, 288 px", f"{way} R@1, %")
            for way in ("image to text", "text to image")
        ),
    ),
]


def text_of(page: str) -> str:
    return (ROOT / page if page.endswith(".md") else ROOT / "experiments" / page / "README.md").read_text()


def value(cell: Cell) -> float:
    """The mean that a cell of a study's table begins with."""
    tables = {name: table for page in PAGES for name, table in TABLE.findall(page.read_text())}
    lines = [line.strip("| ").split(" | ") for line in tables[cell.table].splitlines() if line.startswith("|")]
    start = cell.row.split(" | ")
    (row,) = [line for line in lines if line[: len(start)] == start]
    return float(row[lines[0].index(cell.column)].split()[0].replace(",", ""))


def quoted(page: str, sentence: str) -> Iterator[list[str]]:
    prose = TABLE.sub("", text_of(page))
    for match in re.finditer(sentence.replace(" ", r"\s+"), prose):
        yield [number for number in match.groups() if number is not None]


@pytest.mark.parametrize(
    ("page", "claim"),
    [pytest.param(page, claim, id=f"{page}-{i}") for i, claim in enumerate(CLAIMS) for page in claim.pages],
)
def test_pages_quote_what_was_recorded(page: str, claim: Claim) -> None:
    found = list(quoted(page, claim.sentence))
    assert found, f"{page} has no sentence '{claim.sentence}'"
    for numbers in found:
        for number, cell in zip(numbers, claim.cells, strict=True):
            decimals = len(number.partition(".")[2])
            unit = 10.0**-decimals
            assert abs(float(number) - value(cell)) <= unit / 2 + 1e-9, (
                f"{page} says {number}, {cell} has {value(cell)}"
            )


PUBLISHED = {
    "coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k": "OpenCLIP CoCa L/14, fine-tuned",
    "coca_ViT-L-14/laion2b_s13b_b90k": "OpenCLIP CoCa L/14, LAION-2B",
    "coca_ViT-B-32/laion2b_s13b_b90k": "OpenCLIP CoCa B/32, LAION-2B",
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_scores_of_models(model: str) -> None:
    """The table of public models against what reports show beside our scores."""
    published = json.loads((ROOT / "coca_lit" / "assets" / "published.json").read_text())
    (row,) = re.findall(rf"^\| `{model}` \|.*", text_of("coca_lit/weights/README.md"), re.MULTILINE)
    quoted = [float(number) for number in re.findall(r"\d+\.\d", row.split("|")[6])]
    scores = [("imagenet", "top1"), ("mscoco", "t2i_recall@1"), ("mscoco", "i2t_recall@1")]
    scores += [("mscoco", "CIDEr")] if "finetuned" in model else []
    for number, (data, score) in zip(quoted, scores, strict=True):
        name = "coca_ViT-L-14, fine-tuned" if score == "CIDEr" else PUBLISHED[model]
        (found,) = [row["scores"][score] for row in published[data] if row["name"] == name and score in row["scores"]]
        assert number == pytest.approx(100 * found, abs=0.0501)

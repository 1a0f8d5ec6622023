"""How far caption scores scatter over images, tokenizers and references, from published captions.

    python -m experiments.caption_noise.noise example FOLDER
    python -m experiments.caption_noise.noise test FOLDER

`example` scores coco-caption's example (1,000 images), with SPICE if its jars are there, `test` the captions of a
published model for the 5,000 images of COCO's Karpathy test split. FOLDER holds fakecap_refs.json and
fakecap_results.json, or coco_karpathy_test_generated.json. Rows are added to results.csv, in place of earlier ones of
the same data: a score with its interval for draws of that size, or the difference of two systems on the same draws.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from coca_lit.data.datasets.annotations import read_references, read_results
from coca_lit.metrics.captions import SCORERS, STANDARD, Tokens, score_tokens, tokenize_captions
from coca_lit.metrics.diversity import WORD
from coca_lit.metrics.java.spice import SpiceError, spice_jars
from coca_lit.metrics.uncertainty import DRAWS, Draws, difference
from coca_lit.reading import read_json
from coca_lit.runs.run_folder import environment
from experiments.study import Row, read_rows, write_rows

RESULTS = Path(__file__).with_name("results.csv")
SIZES = (1000, 5000)  # images of a draw
SWAPPED = 0.03  # of the captions
PAIRS = (
    ("model", "model, some swapped"),
    ("model", "model, 4 references"),
    ("model, 4 references", "person, 4 references"),
)

References = Mapping[int | str, Sequence[str]]
Captions = Mapping[int | str, str]


Size = int  # images of a draw
System = dict[Size, dict[str, Draws]]  # score -> its draws; systems of as many images see the same draws


def measured(tokens: Tokens, sizes: Sequence[Size], metrics: Sequence[str] = STANDARD) -> System:
    """Scores of tokenised captions, for draws of each of the sizes, with replacement, from all images."""
    count = len(tokens.references)
    scored = [SCORERS[name](*tokens) for name in metrics]
    once = {name: score for each in scored for name, score in each.scores.items()}
    system: System = {}
    for size in sizes:
        random = np.random.default_rng([count, size])
        drawn = random.multinomial(size, np.full(count, 1 / count), size=DRAWS).astype(np.float64)
        found = {name: values for each in scored for name, values in each.resampled(drawn).items()}
        system[size] = {name: Draws(values, once[name], f"{size} of {count}") for name, values in found.items()}
    return system


def scattered(data: str, name: str, system: System) -> Iterator[Row]:
    """A row for each score and size of the draws; SPICE's categories are left out."""
    for size, draws in system.items():
        for score, of in draws.items():
            if not score.startswith("SPICE_"):
                low, high = of.interval()
                yield row(data, name, "", size, score, of.score, low, high)


def compared(data: str, names: tuple[str, str], first: System, second: System) -> Iterator[Row]:
    """A row for each size and score of both: the second system minus the first, on the same draws."""
    for size in first.keys() & second.keys():
        for score in first[size].keys() & second[size].keys():
            found = difference(first[size][score], second[size][score])
            values = found.value, found.low, found.high
            yield row(data, names[1], names[0], size, score, *values, p=f"{found.p:.3f}")


def row(data: str, captions: str, against: str, images: Size, score: str, *numbers: float, p: str = "") -> Row:
    """Of a value with its interval, if that is known."""
    found = dict(zip(("value", "low", "high"), (f"{number:.5f}" for number in numbers), strict=False))
    return {
        "data": data,
        "captions": captions,
        "against": against,
        "images": str(images),
        "score": score,
        **found,
        "p": p,
    }


def plain(texts: Sequence[str]) -> list[str]:
    """Lower-case words without punctuation: what a tokenizer of one line does."""
    return [" ".join(WORD.findall(text.lower())) for text in texts]


def swapped(captions: Captions, share: float) -> dict[int | str, str]:
    """The captions, of which a share is handed on to the next image of a random choice."""
    chosen = np.random.default_rng(0).permutation(len(captions))[: round(share * len(captions))]
    keys = [list(captions)[i] for i in chosen]
    return {**captions, **{key: captions[other] for key, other in zip(keys, keys[1:] + keys[:1], strict=True)}}


def example(folder: Path) -> Iterator[Row]:
    """A published model with all scores, and the same captions with words split otherwise."""
    data, captions = "example", read_results(folder / "fakecap_results.json")
    references = {item.id: item.captions for item in read_references(folder / "fakecap_refs.json", "test")}
    try:
        spice_jars()
        metrics = tuple(SCORERS)
    except SpiceError as error:
        print(f"SPICE not run: {error}")
        metrics = STANDARD
    system = measured(tokenize_captions(references, captions), [len(captions)], metrics)
    yield from scattered(data, "model", system)
    otherwise = measured(tokenize_captions(references, captions, plain), [len(captions)])
    yield from compared(data, ("PTB tokens", "plain tokens"), system, otherwise)


def test(folder: Path) -> Iterator[Row]:
    """A published model, its scores on fifths of the images, and on one fifth the same model with some captions swapped
    or with fewer references, and a person: the last reference, which leaves four for both.
    """
    data, rows = "COCO test", read_json(folder / "coco_karpathy_test_generated.json")
    ids = [int(Path(item["image_name"]).stem.rpartition("_")[2]) for item in rows]
    references = {key: item["captions"] for key, item in zip(ids, rows, strict=True)}
    captions = {key: item["prediction"] for key, item in zip(ids, rows, strict=True)}
    tokens = tokenize_captions(references, captions)
    yield from scattered(data, "model", measured(tokens, SIZES))
    fifths = [part.tolist() for part in np.array_split(np.random.default_rng(0).permutation(ids), 5)]
    for part in fifths:
        for score, value in score_tokens(tokens.of(part)).items():
            yield row(data, "model, a fifth", "", len(part), score, value)

    fifth = fifths[0]
    references, captions = ({key: of[key] for key in fifth} for of in (references, captions))
    systems = {
        "model": (references, captions),
        "model, some swapped": (references, swapped(captions, SWAPPED)),
        "model, 4 references": (four := {key: texts[:-1] for key, texts in references.items()}, captions),
        "person, 4 references": (four, {key: texts[-1] for key, texts in references.items()}),
    }
    found = {name: measured(tokenize_captions(*system), [len(fifth)]) for name, system in systems.items()}
    for first, second in PAIRS:
        yield from compared(f"{data}, a fifth", (first, second), found[first], found[second])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["example", "test"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = (example if args.what == "example" else test)(args.folder)
    about = {name: str(environment()[name]) for name in ("commit", "machine", "torch")}
    new = [each | about for each in found]
    sets = {each["data"] for each in new}
    write_rows(RESULTS, [*(each for each in read_rows(RESULTS) if each["data"] not in sets), *new])


if __name__ == "__main__":
    main()

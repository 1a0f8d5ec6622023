"""How far caption scores scatter over images, tokenizers, references, seeds and numbers of beams.

    python -m experiments.caption_noise.noise example FOLDER
    python -m experiments.caption_noise.noise test FOLDER
    python -m experiments.caption_noise.noise scenes outputs

`example` scores coco-caption's example (1,000 images), `test` the captions of a published model for the 5,000 images of
COCO's Karpathy test split, `scenes` the captions that the three models of experiments/demo write with 1, 2, 4 and 8
beams. FOLDER holds fakecap_refs.json and fakecap_results.json, or coco_karpathy_test_generated.json; outputs holds the
runs of experiments/demo. SPICE is scored if its jars are there; `test` then takes a quarter of an hour. Rows in the CSV
replace earlier ones of the same data: a score with its interval for draws of that size, or the difference of two
systems on the same draws.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from coca_lit.data.datasets.annotations import read_references
from coca_lit.data.scenes.render import scene_records
from coca_lit.evals.inference import caption_images
from coca_lit.metrics.captions import SCORERS, STANDARD, WORD, Tokens, score_tokens, tokenize_captions
from coca_lit.metrics.java.spice import SpiceError, spice_jars
from coca_lit.metrics.uncertainty import DRAWS, Draws, difference
from coca_lit.reading import read_json
from coca_lit.runs.run_folder import environment
from coca_lit.tools.score.results import read_results
from coca_lit.weights.load import load_model
from experiments.study import Row, replace_rows

SIZES = (1000, 5000)  # images of a draw
SWAPPED = 0.03  # of the captions
BEAMS = {"greedy": {}, **{f"{n} beams": {"strategy": "beam", "num_beams": n} for n in (2, 4, 8)}}
SEEDS = (0, 1, 2)
PAIRS = (
    ("model", "model, some swapped"),
    ("model", "model, 4 references"),
    ("model, 4 references", "person, 4 references"),
)

References = Mapping[int | str, Sequence[str]]
Captions = Mapping[int | str, str]


Size = int  # images of a draw
System = dict[Size, dict[str, Draws]]  # score -> its draws; systems of as many images see the same draws


def metrics() -> tuple[str, ...]:
    """All scores, or all but SPICE where its jars are missing."""
    try:
        spice_jars()
    except SpiceError as error:
        print(f"SPICE not run: {error}")
        return STANDARD
    return tuple(SCORERS)


def measured(tokens: Tokens, sizes: Sequence[Size], metrics: Sequence[str] = STANDARD) -> System:
    """Scores of tokenised captions, without SPICE's categories, for draws with replacement of each size."""
    count = len(tokens.references)
    scored = [SCORERS[name](*tokens) for name in metrics]
    once = {name: score for each in scored for name, score in each.scores.items() if not name.startswith("SPICE_")}
    system: System = {}
    for size in sizes:
        random = np.random.default_rng([count, size])
        drawn = random.multinomial(size, np.full(count, 1 / count), size=DRAWS).astype(np.float64)
        found = {name: values for each in scored for name, values in each.resampled(drawn).items()}
        system[size] = {name: Draws(found[name], score, f"{size} of {count}") for name, score in once.items()}
    return system


def mean(systems: Sequence[System]) -> System:
    """A system whose scores are the means over several systems, draw by draw."""
    found: System = {}
    for size, first in systems[0].items():
        found[size] = {}
        for name, draws in first.items():
            values, scores, *_ = zip(*(system[size][name] for system in systems), strict=True)
            found[size][name] = Draws(np.mean(values, axis=0), statistics.mean(scores), draws.units)
    return found


def scattered(data: str, name: str, system: System) -> Iterator[Row]:
    """A row for each score and size of the draws."""
    for size, draws in system.items():
        for score, of in draws.items():
            yield row(data, name, "", size, score, of.score, *of.interval())


def compared(data: str, names: tuple[str, str], first: System, second: System) -> Iterator[Row]:
    """A row for each size and score: the second system minus the first, on the same draws."""
    for size, draws in first.items():
        for score in draws:
            found = difference(draws[score], second[size][score])
            yield row(data, names[1], names[0], size, score, *found[:3], p=f"{found.p:.3f}")


def row(data: str, captions: str, against: str, images: Size, score: str, *numbers: float, p: str = "") -> Row:
    """A row of the CSV: a value, and its interval if that is known."""
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
    """The captions, but a random share of the images take that of the next image drawn."""
    chosen = np.random.default_rng(0).permutation(len(captions))[: round(share * len(captions))]
    keys = [list(captions)[i] for i in chosen]
    return {**captions, **{key: captions[other] for key, other in zip(keys, keys[1:] + keys[:1], strict=True)}}


def example(folder: Path) -> Iterator[Row]:
    """A published model with all scores, and the same captions with words split by one regular expression."""
    data, captions = "example", read_results(folder / "fakecap_results.json")
    references = {item.id: item.captions for item in read_references(folder / "fakecap_refs.json", "test")}
    system, otherwise = (
        measured(tokenize_captions(references, captions, *how), [len(captions)], metrics()) for how in ([], [plain])
    )
    yield from scattered(data, "model", system)
    yield from compared(data, ("PTB tokens", "plain tokens"), system, otherwise)


def test(folder: Path) -> Iterator[Row]:
    """A published model, and its scores on fifths of the images. On one fifth also the same model with some captions
    swapped, the same model on four references, and a person: the fifth reference, scored on the other four.
    """
    data, rows = "COCO test", read_json(folder / "coco_karpathy_test_generated.json")
    ids: list[int | str] = [int(Path(item["image_name"]).stem.rpartition("_")[2]) for item in rows]
    references = {key: item["captions"] for key, item in zip(ids, rows, strict=True)}
    captions = {key: item["prediction"] for key, item in zip(ids, rows, strict=True)}
    tokens = tokenize_captions(references, captions)
    yield from scattered(data, "model", measured(tokens, SIZES, metrics()))
    fifths = [part.tolist() for part in np.array_split(np.random.default_rng(0).permutation(ids), 5)]
    for part in fifths:
        for score, value in score_tokens(tokens.of(part)).items():
            yield row(data, "model, mean of five fifths", "", len(part), score, value)

    fifth = fifths[0]
    references, captions = ({key: of[key] for key in fifth} for of in (references, captions))
    systems: dict[str, tuple[References, Captions]] = {
        "model": (references, captions),
        "model, some swapped": (references, swapped(captions, SWAPPED)),
        "model, 4 references": (four := {key: texts[:-1] for key, texts in references.items()}, captions),
        "person, 4 references": (four, {key: texts[-1] for key, texts in references.items()}),
    }
    data = f"{data}, first fifth"
    found = {name: measured(tokenize_captions(*system), [len(fifth)], metrics()) for name, system in systems.items()}
    yield from scattered(data, "model", found["model"])
    for first, second in PAIRS:
        yield from compared(data, (first, second), found[first], found[second])


def scenes(outputs: Path) -> Iterator[Row]:
    """Unseen combinations, captioned by three models that differ in their seed: their mean for each number of beams and
    its difference from the next smaller number, and each seed against the first.
    """
    data, found = "scenes, unseen combinations", {}
    for seed in SEEDS:
        model = load_model(outputs / f"scenes_seed{seed}" / "checkpoints" / "last.ckpt")
        records = scene_records("compositional", size=model.image_size)
        references = {record.id: record.captions for record in records}
        for beams, options in BEAMS.items():
            tokens = tokenize_captions(references, caption_images(model, records, options=options))
            found[beams, seed] = measured(tokens, [len(records)], metrics())
    means = {beams: mean([found[beams, seed] for seed in SEEDS]) for beams in BEAMS}
    for beams in BEAMS:
        yield from scattered(data, f"three seeds, {beams}", means[beams])
    for seed in SEEDS:
        for size, draws in found["greedy", seed].items():
            for score, of in draws.items():
                yield row(data, "a seed, greedy", "", size, score, of.score)
    for fewer, more in pairwise(BEAMS):
        yield from compared(data, (fewer, more), means[fewer], means[more])
    for seed in SEEDS[1:]:
        yield from compared(data, ("seed 0", f"seed {seed}"), found["greedy", 0], found["greedy", seed])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["example", "test", "scenes"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"), help="the CSV")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {"example": example, "test": test, "scenes": scenes}[args.what](args.folder)
    about = {name: str(environment()[name]) for name in ("commit", "machine", "torch")}
    replace_rows(args.out, [each | about for each in found], by=["data"])


if __name__ == "__main__":
    main()

"""Image-text choice: by hand, against CLIP_benchmark and against loops, from files in the original layouts."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coca_lit.cli.assembly import build_evals
from coca_lit.cli.command import compose
from coca_lit.data.records import Record
from coca_lit.data.scenes.facts import scene_facts
from coca_lit.data.transforms import build_transform
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.evals import Settings
from coca_lit.metrics.uncertainty import Ratios, bootstrap, exact, resamples
from coca_lit.projects.choice.evaluation import ChoiceAccuracy, ChoiceScores, is_right, pair_accuracy
from coca_lit.projects.choice.files import (
    SUGARCREPE,
    SUGARCREPE_PP,
    sugarcrepe_pp_records,
    sugarcrepe_records,
    winoground_records,
)
from coca_lit.projects.choice.scenes import scene_choice_records
from helpers.evaluating import WORDS, make_model, noise


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 6)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SugarCrepe and Winoground, a few cases of each."""
    root, rng = tmp_path_factory.mktemp("choice"), random.Random(0)
    for folder in ("val2017", "data/images"):
        (root / folder).mkdir(parents=True)
    for kind in SUGARCREPE:
        cases = {}
        for key in (0, 2, 3):  # indices of the original are not contiguous either
            name = f"{kind}{key}.jpg"
            noise(rng.randrange(99)).save(root / "val2017" / name)
            cases[str(key)] = {"filename": name, "caption": text(rng), "negative_caption": text(rng)}
        (root / "data" / f"{kind}.json").write_text(json.dumps(cases))
    lines = []
    for id in range(9):
        for i in (0, 1):
            noise(100 + 2 * id + i).save(root / "data" / "images" / f"ex_{id}_img_{i}.png")
        names = {f"image_{i}": f"ex_{id}_img_{i}" for i in (0, 1)}
        lines.append({"id": id, **names, "caption_0": text(rng), "caption_1": text(rng), "tag": "Object"})
    (root / "data" / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def test_by_hand() -> None:
    scores = [torch.tensor(row) for row in ([0.9, 0.1], [0.2, 0.2], [0.5, 0.4, 0.6], [0.3])]
    right = is_right(scores)  # right, a tie is wrong, the second rival wins, no rival
    assert right.tolist() == [True, False, False, True]
    found = exact(4, ChoiceAccuracy(right, ["a", "a", "b", None]))
    assert found == {"accuracy": 0.5, "macro_accuracy": 0.25, "a_accuracy": 0.5, "b_accuracy": 0.0}
    assert exact(4, ChoiceAccuracy(right, [None] * 4)) == {"accuracy": 0.5}
    rare = bootstrap(range(100), ChoiceAccuracy(np.ones(100, dtype=bool), ["a", *["b"] * 99]))
    assert rare["a_accuracy"].interval()[0] < 0.25  # one image
    assert rare["b_accuracy"].interval()[0] > 0.95
    with pytest.raises(ValueError, match="nan"):
        is_right([torch.tensor([0.5, torch.nan])])


def test_winoground_by_hand() -> None:
    """Per image: its own text, the other one. Pair 0: all right. 1: the texts are right, but text 1 has the wrong
    image (0.3 < 0.4). 2: text 0 is wrong for image 0, both images are right."""
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.5, 0.4], [0.3, 0.2], [0.4, 0.5], [0.6, 0.3]])
    found = exact(3, pair_accuracy(list(scores)))
    assert found == {"text_score": pytest.approx(2 / 3), "image_score": pytest.approx(2 / 3), "group_score": 1 / 3}
    tie = torch.tensor([[0.5, 0.1], [0.9, 0.5]])  # text 0 goes as well with image 1 as with its own
    assert exact(1, pair_accuracy(list(tie))) == {"text_score": 1, "image_score": 0, "group_score": 0}
    assert exact(1, pair_accuracy(list(torch.zeros(2, 2)))) == {"text_score": 0, "image_score": 0, "group_score": 0}


def test_draws_are_scores_of_the_drawn_images() -> None:
    rng = np.random.default_rng(0)
    right, kinds = rng.random(12) < 0.5, [str(kind) for kind in rng.integers(3, size=12)]
    counts = next(resamples(12, draws=20))
    found = ChoiceAccuracy(right, kinds)(counts)
    for draw, row in enumerate(counts):
        taken = np.repeat(np.arange(12), row.astype(int))
        again = exact(12, ChoiceAccuracy(right[taken], [kinds[i] for i in taken]))
        assert {name: found[name][draw] for name in again} == pytest.approx(again)


def test_images_are_drawn_with_all_their_cases() -> None:
    """Five cases of an image that agree say as much as one."""
    right, kinds = np.random.default_rng(0).random(80) < 0.5, ["a"] * 80
    once = bootstrap(range(80), ChoiceAccuracy(right, kinds))
    images = [f"{i}.jpg" for i in range(80)]
    cases = bootstrap(range(80), ChoiceAccuracy(np.repeat(right, 5), kinds * 5, np.repeat(images, 5).tolist()))
    for name, draws in once.items():
        assert cases[name].interval() == pytest.approx(draws.interval())


def naive(records: Sequence[Record]) -> dict[str, list[torch.Tensor]]:
    """Cosines and log-likelihoods of each image and each of its texts, one by one."""
    model = make_model().eval()
    transform, found = build_transform(**model.preprocessing), {"": [], "likelihood/": [], "pmi/": []}
    blank = transform(Image.new("RGB", (99, 77), (123, 117, 104)))[None]
    with torch.no_grad():
        for record in records:
            image, tokens = transform(record.image())[None], [model.tokenizer([text]) for text in record.captions]
            read = torch.stack([model.log_likelihood(image, text)[0] for text in tokens])
            blind = torch.stack([model.log_likelihood(blank, text)[0] for text in tokens])
            found[""].append(
                torch.stack([model.encode_image(image)[0] @ model.encode_text(text)[0] for text in tokens])
            )
            found["likelihood/"].append(read)
            found["pmi/"].append(read - blind)
    return found


@pytest.fixture(scope="module")
def sugarcrepe(root: Path) -> tuple[list[Record], dict[str, list[torch.Tensor]]]:
    records = sugarcrepe_records(root)
    return records, naive(records)


def test_embeddings_and_decoder_equal_loops(sugarcrepe: tuple, tmp_path: Path) -> None:
    records, looped = sugarcrepe
    evaluation = ChoiceScores("sugarcrepe", records)
    scores = evaluation.evaluate(make_model(), Settings(tmp_path, batch_size=5))
    expected = {}
    for way, found in looped.items():
        right = [bool(row[0] > row[1]) for row in found]
        of = {
            kind: [r for r, record in zip(right, records, strict=True) if record.domain == kind] for kind in SUGARCREPE
        }
        means = {f"{kind}_accuracy": sum(values) / 3 for kind, values in of.items()}
        means |= {"accuracy": sum(right) / 21, "macro_accuracy": sum(means.values()) / 7}
        expected |= {f"sugarcrepe/{way}{name}": value for name, value in means.items()}
    assert scores == pytest.approx(expected)
    assert evaluation.draws.keys() == scores.keys()
    assert len({scores[f"sugarcrepe/{way}accuracy"] for way in ("", "likelihood/", "pmi/")}) > 1
    quick = evaluation.evaluate(make_model(), Settings(tmp_path, full=False), limit=21)
    assert {f"sugarcrepe/{name}" for name in evaluation.score_names} == quick.keys()
    assert quick == {name: value for name, value in scores.items() if name.count("/") == 1}


@pytest.mark.slow
def test_winoground_equals_a_loop(root: Path, tmp_path: Path) -> None:
    records = winoground_records(root)
    assert len(records) == 18
    scores = ChoiceScores("winoground", records, paired=True).evaluate(make_model(), Settings(tmp_path))
    for way, found in naive(records).items():
        text = [bool(a[0] > a[1] and b[0] > b[1]) for a, b in zip(found[::2], found[1::2], strict=True)]
        image = [bool(a[0] > b[1] and b[0] > a[1]) for a, b in zip(found[::2], found[1::2], strict=True)]
        group = [t and i for t, i in zip(text, image, strict=True)]
        for name, values in (("text", text), ("image", image), ("group", group)):
            assert scores[f"winoground/{way}{name}_score"] == pytest.approx(sum(values) / 9)
    few = ChoiceScores("winoground", records, paired=True).evaluate(make_model(), Settings(tmp_path, images=5))
    assert few["winoground/text_score"] in (0, 0.5, 1)  # two whole pairs
    with pytest.raises(DataError, match=r"winoground.*2"):
        ChoiceScores("winoground", records, paired=True).evaluate(make_model(), Settings(tmp_path, images=1))


def test_two_right_texts(tmp_path: Path) -> None:
    """SugarCrepe++ in its files: both right texts must be above the wrong one; among texts alone, nearer to each other
    than to it.
    """
    rng = random.Random(0)
    for kind in SUGARCREPE_PP:
        cases = []
        for id in range(4):
            noise(rng.randrange(99)).save(tmp_path / f"{kind}{id}.jpg")
            texts = {name: text(rng) for name in ("caption", "caption2", "negative_caption")}
            cases.append({"id": id, "filename": f"{kind}{id}.jpg", **texts})
        (tmp_path / f"{kind}.json").write_text(json.dumps(cases))
    records = sugarcrepe_pp_records(tmp_path)
    assert len(records) == 20
    scores = ChoiceScores("pp", records, right=2).evaluate(make_model(), Settings(tmp_path))
    for way, found in naive(records).items():
        right = [bool(row[0] > row[2] and row[1] > row[2]) for row in found]
        assert scores[f"pp/{way}accuracy"] == pytest.approx(sum(right) / 20)
    model, alike = make_model().eval(), []
    with torch.no_grad():
        for record in records:
            one, two, wrong = (model.encode_text(model.tokenizer([caption]))[0] for caption in record.captions)
            alike.append(bool(one @ two > one @ wrong and one @ two > two @ wrong))
    assert scores["pp/text_only/accuracy"] == pytest.approx(sum(alike) / 20)
    assert 0 < sum(alike) < 20
    assert is_right([torch.tensor([0.5, 0.2, 0.3]), torch.tensor([0.5, 0.4, 0.3])], right=2).tolist() == [False, True]
    with pytest.raises(ValueError, match="right"):
        ChoiceScores("pp", records, paired=True, right=2)


def test_equal_to_clip_benchmark(root: Path, tmp_path: Path) -> None:
    theirs = pytest.importorskip("clip_benchmark.metrics.image_caption_selection")
    model = make_model().eval()
    transform = build_transform(**model.preprocessing)
    sugar, pairs = sugarcrepe_records(root), winoground_records(root)

    def loader(groups: Sequence[Sequence[Record]], texts: Sequence[Sequence[str]]) -> list:
        images = [torch.stack([transform(record.image()) for record in group]) for group in groups]
        return [(image[None], [text]) for image, text in zip(images, texts, strict=True)]

    alone = loader([[record] for record in sugar], [record.captions for record in sugar])
    found = theirs.evaluate(model, alone, model.tokenizer, "cpu", amp=False)
    ours = ChoiceScores("x", sugar).evaluate(model, Settings(tmp_path))
    assert ours["x/accuracy"] == pytest.approx(found["text_acc"])
    two = loader(list(zip(pairs[::2], pairs[1::2], strict=True)), [record.captions for record in pairs[::2]])
    found = theirs.evaluate(model, two, model.tokenizer, "cpu", amp=False)
    ours = ChoiceScores("x", pairs, paired=True).evaluate(model, Settings(tmp_path))
    assert ours["x/text_score"] == pytest.approx(found["text_acc"])
    assert ours["x/image_score"] == pytest.approx(found["image_acc"])
    assert ours["x/group_score"] == pytest.approx(found["acc"])


@pytest.mark.parametrize(("kinds", "read"), [(SUGARCREPE, sugarcrepe_records), (SUGARCREPE_PP, sugarcrepe_pp_records)])
def test_the_first_cases_are_of_all_kinds(kinds: tuple[str, ...], read: Callable, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg")
    case = {"filename": "0.jpg", "caption": "a", "caption2": "b", "negative_caption": "c"}
    for kind in kinds:
        cases = [{"id": i, **case} for i in range(30)]
        content = cases if read is sugarcrepe_pp_records else dict(enumerate(cases))
        (tmp_path / f"{kind}.json").write_text(json.dumps(content))
    records = read(tmp_path)
    assert len(records) == 30 * len(kinds)
    assert {record.domain for record in records[:40]} == set(kinds)


def test_records_without_texts_are_refused_before_training() -> None:
    with pytest.raises(DataError, match="mine"):
        ChoiceScores("mine", [])
    records = [Record(f"image {i}", Path("x.png"), () if i in (2, 4) else ("a", "b")) for i in range(7)]
    with pytest.raises(DataError, match=r"2 of 7 .*'mine'.*'image 2'"):
        ChoiceScores("mine", records)


def test_missing_data_name_their_key(tmp_path: Path) -> None:
    for read in (sugarcrepe_records, sugarcrepe_pp_records, winoground_records):
        with pytest.raises(DataNotFoundError, match=str(tmp_path)):
            read(tmp_path)
    (tmp_path / "mscoco").mkdir()
    with pytest.raises(DataError, match=r"; set roots.sugarcrepe or roots.mscoco=PLACE .*scoring.skip_missing"):
        build_evals(compose("train", ["evals=[sugarcrepe_choice]", f"data_dir={tmp_path}"]))


# Wrong captions of built-in scenes


def scores(caption: str, true: str) -> dict[str, tuple[float, float]]:
    """Precision and recall by kind."""
    found = exact(1, Ratios(scene_facts([Record(0, "x.png", [true])], {0: caption})))
    return {kind: (found[f"{kind}_precision"], found[f"{kind}_recall"]) for kind in ("object", "attribute", "relation")}


def test_wrong_captions_differ_in_what_their_kind_says() -> None:
    records = scene_choice_records("val", count=50)
    kinds = {kind: [record for record in records if record.domain == kind] for kind in ("order", "colour", "shape")}
    assert len(kinds["shape"]) == 50
    assert 30 < len(kinds["colour"]) < 50  # objects of one colour have no other order of colours
    assert len({record.id for record in records}) == len(records)
    for record in records:
        found = scores(record.captions[1], true=record.captions[0])
        assert found["relation"] == (0, 0)
        assert found["object"] == ((0.5, 0.5) if record.domain == "shape" else (1, 1))
        if record.domain == "order":
            assert found["attribute"] == (1, 1)

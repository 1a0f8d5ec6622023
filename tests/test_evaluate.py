"""`coca-evaluate` from its configuration to its files, on one and on two processes."""

import json
import subprocess
import sys

import hydra
import pytest
import torch

from coca_lit.checkpoints import save_model
from coca_lit.cli import CONF
from coca_lit.config import ConfigError
from coca_lit.data.records import DataNotFoundError
from coca_lit.evaluate import run
from coca_lit.models import create_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small CoCa with random weights, exported."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(create_model("coca_tiny"), path)
    return path


def compose(folder, *overrides):
    folder.mkdir(exist_ok=True)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("evaluate", [f"output_dir={folder}", "name=test", f"data_dir={folder}", *overrides])


def test_captions_and_retrieval(checkpoint, tmp_path):
    cfg = compose(tmp_path, f"checkpoint={checkpoint}", "eval_images=8", "evals=[scenes_captions,scenes_retrieval]")
    results = run(cfg)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert {"scenes/CIDEr", "scenes/METEOR", "scenes/Bleu_4", "scenes/t2i_recall@1"} <= results.keys()
    predictions = json.loads((tmp_path / "predictions" / "scenes.json").read_text())
    assert len({row["image_id"] for row in predictions}) == len(predictions) == 8
    assert (tmp_path / "samples" / "scenes.png").exists()
    assert cfg.image_size == 32  # the model's


def test_all_skips_what_is_missing_and_says_where_it_looked(checkpoint, tmp_path, capsys):
    absent = ["mscoco_captions", "mscoco_retrieval", "flickr30k_retrieval", "flickr8k_captions", "nocaps_captions"]
    off = [f"evals.{name}=null" for name in ("scenes_captions", "compositional_captions")]
    results = run(compose(tmp_path, f"checkpoint={checkpoint}", "eval_images=8", "evals=all", *off))
    not_run = json.loads((tmp_path / "not_run.json").read_text())
    assert set(absent) <= not_run.keys()
    assert str(tmp_path / "nocaps") in not_run["nocaps_captions"]
    assert {name.split("/")[0] for name in results} >= {"scenes", "compositional"}
    assert "skipped mscoco_captions: the Karpathy split" in capsys.readouterr().out


def test_missing_data_that_were_asked_for_are_an_error(checkpoint, tmp_path):
    with pytest.raises(DataNotFoundError, match="captions of nocaps"):
        run(compose(tmp_path, f"checkpoint={checkpoint}", "evals=[nocaps_captions]"))


def test_a_clip_has_no_captions_to_score(tmp_path):
    save_model(create_model("coca_tiny", decoder_layers=0), tmp_path / "clip.safetensors")
    evals = "evals=[scenes_captions,scenes_retrieval]"
    results = run(compose(tmp_path, f"checkpoint={tmp_path}/clip.safetensors", "eval_images=4", evals))
    assert "scenes/t2i_recall@1" in results
    assert "scenes/CIDEr" not in results
    assert "no decoder" in json.loads((tmp_path / "not_run.json").read_text())["scenes captions"]


def test_checkpoint_of_another_architecture(tmp_path):
    torch.save({"some.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="checkpoint: this is not an OpenCLIP CoCa checkpoint"):
        run(compose(tmp_path, f"checkpoint={tmp_path / 'other.pt'}", "evals=[scenes_retrieval]"))


def test_mistakes_are_one_sentence(tmp_path):
    command = [sys.executable, "-m", "coca_lit.evaluate", "checkpoint=absent.ckpt", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: there is no checkpoint 'absent.ckpt'"


def test_two_processes_give_the_scores_of_one(checkpoint, tmp_path):
    choice = [f"checkpoint={checkpoint}", "eval_images=13", "evals=[scenes_retrieval]", "threads=1"]
    expected = run(compose(tmp_path / "one", *choice))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "coca_lit.evaluate", *choice, f"hydra.run.dir={tmp_path / 'two'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "results.json").read_text()) == expected

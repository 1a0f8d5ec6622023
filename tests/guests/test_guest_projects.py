"""A package with a project of each kind, installed as a wheel: its names, configs, commands and formats are found, and
its code is imported when they are used.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("pip", reason="the wheel is built by pip")
pytestmark = pytest.mark.slow  # commands in processes of their own

BIN = os.environ.get("COCA_LIT_BIN", str(Path(sys.executable).parent))
PACKAGE = Path(__file__).resolve().parent / "guest_projects"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with the wheel alone."""
    folder = tmp_path_factory.mktemp("site")
    options = ("--quiet", "--no-deps", "--disable-pip-version-check")
    built = folder / "wheel"
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", built, PACKAGE], check=True)
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", wheel], check=True)
    return folder / "site"


def run(site: Path, name: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [f"{BIN}/{name}", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def command(site: Path, name: str, *words: str, cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    done = run(site, name, *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a text side, a pooler, an objective and evaluations of the package."""
    folder = tmp_path_factory.mktemp("runs")
    parts = ("model.net.text_tower=scaled", "model.net.pooler=mean_max", "+model.net.pooler_args.share=0.5")
    evals = "evals=[scenes_colours,scenes_colour_words]"
    command(site, "coca-train", "experiment=colours", "trainer=smoke", *parts, evals, "hydra.run.dir=run", cwd=folder)
    return folder / "run"


def test_help_names_what_the_package_adds(site: Path, tmp_path: Path) -> None:
    added = command(site, "coca-train", "--help", cwd=tmp_path).partition("Added by installed packages\n")[2]
    for name in ("bursts", "scaled_text", "mean_max", "colour_guess", "colour_words", "word_list"):
        assert f"  {name} (from the package guest-projects): " in added
    assert "experiment=colours" in added
    assert "word-list" in command(site, "coca-data", "--help", cwd=tmp_path)


def test_parts_objective_and_evaluations(site: Path, trained: Path, tmp_path: Path) -> None:
    lines = (trained / "metrics.csv").read_text().splitlines()
    assert "train/colour_loss" in lines[0].split(",")
    results = json.loads((trained / "results.json").read_text())
    assert 0 <= results["scenes/named_colours"] <= 1
    assert 0 <= results["scenes_by_colour/reranked_t2i_recall@1"] <= 1
    checkpoint = f"checkpoint={trained}/checkpoints/last.ckpt"
    same = ("scoring.split=val", "scoring.images=8", "evals=scenes_colours", "hydra.run.dir=scored")
    command(site, "coca-evaluate", checkpoint, *same, cwd=tmp_path)
    again = json.loads((tmp_path / "scored" / "results.json").read_text())
    assert again["scenes/colour_error"] == pytest.approx(results["scenes/colour_error"], rel=1e-4)


def test_scores_of_a_model_without_the_objective(site: Path, tmp_path: Path) -> None:
    words = ("experiment=scenes", "trainer=smoke", "evals=scenes_colours", "hydra.run.dir=run")
    command(site, "coca-train", *words, cwd=tmp_path)
    reasons = json.loads((tmp_path / "run" / "not_run.json").read_text())
    for score in ("scenes (ColourError)", "scenes_by_colour reranked recall"):
        assert "the model has no ColourGuess" in reasons[score]
    assert "scenes_by_colour/t2i_recall@1" in json.loads((tmp_path / "run" / "results.json").read_text())


def test_a_burst_is_captioned_as_the_mean_of_its_pages(site: Path, trained: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pages = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(3)]
    pages[0].save(tmp_path / "burst.tif", save_all=True, append_images=pages[1:])
    mean = np.mean([np.array(page, float) for page in pages[:2]], axis=0).round().astype(np.uint8)
    Image.fromarray(mean).save(tmp_path / "mean.png")
    pages[0].save(tmp_path / "first.png")
    checkpoint = f"checkpoint={trained}/checkpoints/last.ckpt"
    words = ("burst.tif", "mean.png", "first.png", checkpoint, "pages=2")
    command(site, "coca-caption", *words, "output=captions.jsonl", cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    captions = {line["path"]: line["caption"] for line in lines}
    assert captions["burst.tif"] == captions["mean.png"] != captions["first.png"]
    print((tmp_path / "captions.jsonl").read_text())
    found = command(site, "coca-search", ".", "a red circle", checkpoint, "pages=2", cwd=tmp_path)
    assert "burst.tif" in found


def test_the_text_side_is_written_and_read_in_the_format_of_open_clip(site: Path, tmp_path: Path) -> None:
    parts = (
        "model.net.text_tower=scaled",
        "model.net.tokenizer=clip",
        "model.net.image_encoder=vit_base_patch32_clip_224",
        "+model.net.image_encoder_args={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
    )
    words = ("experiment=scenes", "trainer=smoke", "evals=[]", "hydra.run.dir=run")
    command(site, "coca-train", *words, *parts, cwd=tmp_path)
    checkpoint = "checkpoint=run/checkpoints/last.ckpt"
    command(site, "coca-export", checkpoint, "format=open_clip", "version=scaled", "output=exported", cwd=tmp_path)
    options = ("format=safetensors", "output=back")
    command(site, "coca-export", "checkpoint=exported", *options, cwd=tmp_path)
    command(site, "coca-export", checkpoint, "format=safetensors", "output=direct", cwd=tmp_path)
    (back,), (direct,) = (list((tmp_path / name).glob("*.safetensors")) for name in ("back", "direct"))
    ours, theirs = load_file(direct), load_file(back)
    assert ours.keys() == theirs.keys()
    assert "text.token_embedding.scale" in ours
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_the_command(site: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,a dog\nb.jpg,a cat\n")
    printed = command(site, "coca-data", "word-list", "captions.csv", cwd=tmp_path)
    assert printed.splitlines() == ["a 2", "dog 1", "cat 1"]


def test_without_the_package_its_model_is_refused_in_one_sentence(trained: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    nothing = tmp_path / "no packages"
    done = run(nothing, "coca-caption", "x.png", f"checkpoint={trained}/checkpoints/last.ckpt", cwd=tmp_path)
    assert done.returncode == 1
    assert "mean_max" in done.stderr or "scaled" in done.stderr
    assert "Traceback" not in done.stderr

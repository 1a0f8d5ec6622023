"""Captions of clips and search among them: each equals what the model makes of the clip's frames alone."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("av")

from coca_lit import build_transform, save_model
from coca_lit.data.scenes.render import render
from coca_lit.errors import DataError
from coca_lit.models import CoCa
from coca_lit.projects.video.clips import ClipFile
from coca_lit.projects.video.inputs import Clips
from coca_lit.tools.search.index import ImageIndex
from helpers.applying import caption, new_model, run
from helpers.clips import write_clip


@pytest.fixture(scope="module")
def model() -> CoCa:
    return new_model()


@pytest.fixture
def folder(model: CoCa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three clips, two images, and a clip that cannot be read."""
    monkeypatch.chdir(tmp_path)
    save_model(model, tmp_path / "tiny.safetensors")
    (tmp_path / "videos").mkdir()
    for i in range(3):
        scenes = [np.asarray(render(number, size=64)) for number in range(i * 900, i * 900 + 500, 60)]
        write_clip(tmp_path / "videos" / f"{i}.mp4", scenes)
    for i in range(2):
        render(i * 37, size=40).save(tmp_path / "videos" / f"{i}.png")
    (tmp_path / "videos" / "cut.MP4").write_bytes((tmp_path / "videos" / "0.mp4").read_bytes()[:200])
    return tmp_path / "videos"


def frames_of(model: CoCa, path: Path, count: int) -> Clips:
    transform = build_transform(**model.preprocessing)
    return Clips(torch.stack([transform(frame) for frame in ClipFile(path, count).frames()])[None])


def test_captions(model: CoCa, folder: Path, capsys: pytest.CaptureFixture) -> None:
    caption("checkpoint=tiny.safetensors", "images=[videos]", "frames=4", "num_workers=0", "precision=fp32")
    out, err = capsys.readouterr()
    found = dict(line.split("\t") for line in out.splitlines())
    assert len(found) == 5
    assert "skipped: videos/cut.MP4 is not a readable clip" in err
    for i in range(3):
        ids = model.generate(frames_of(model, folder / f"{i}.mp4", 4), strategy="beam")[0]
        assert found[f"videos/{i}.mp4"] == " ".join(model.tokenizer.decode(ids).split())
    image = build_transform(**model.preprocessing)(Image.open(folder / "0.png"))[None]
    ids = model.generate(image, strategy="beam")[0]
    assert found["videos/0.png"] == " ".join(model.tokenizer.decode(ids).split())


def test_search(model: CoCa, folder: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("search", "checkpoint=tiny.safetensors", "num_workers=0", "index=videos")
    hits = run(*words, "query=a red circle", "frames=4")
    assert {hit.path.name for hit in hits} == {"0.mp4", "1.mp4", "2.mp4", "0.png", "1.png"}
    text = model.encode_text(model.tokenizer("a red circle"))[0]
    for hit in hits:
        if hit.path.suffix == ".mp4":
            with torch.no_grad():
                score = float(model.encode_image(frames_of(model, hit.path, 4))[0] @ text)
            assert hit.score == pytest.approx(score, abs=1e-5)
    capsys.readouterr()
    run(*words, "query=a red circle", "frames=4")
    assert "changed" not in capsys.readouterr().err
    run(*words, "query=a red circle", "frames=2")
    assert "(0 added, 3 changed, 0 removed)" in capsys.readouterr().err
    alike = run(*words, "query=videos/0.mp4", "frames=2")
    assert {hit.path.name for hit in alike} == {"1.mp4", "2.mp4", "0.png", "1.png"}
    images = ImageIndex(model, folder)
    images.update()
    assert len(images) == 2


def test_a_model_with_positions_names_its_number(folder: Path) -> None:
    save_model(new_model(frame_positions=3), "positions.safetensors")
    with pytest.raises(DataError, match="positions for 3 frames, got clips of 8: set frames=3"):
        caption("checkpoint=positions.safetensors", "images=[videos]", "num_workers=0")


def test_shards_of_clips_are_refused(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("0.mp4", "0.txt"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match=r"0\.tar holds clips"):
        caption(f"checkpoint={tmp_path}/tiny.safetensors", f"images=[{tmp_path}/0.tar]", f"output={tmp_path}/new/")
    assert not list((tmp_path / "new").glob("*.tar"))

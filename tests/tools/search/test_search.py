"""The index of a folder of images: against features computed image by image, and through every change of the folder."""

import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from coca_lit import build_transform
from coca_lit.data.scenes.render import render
from coca_lit.errors import DataError
from coca_lit.models import CLIP, CoCa, create_model
from coca_lit.tokenizer import get_tokenizer
from coca_lit.tools.search import index as search_index
from coca_lit.tools.search.index import Hit, ImageIndex, check_query, index_file, refresh

NAMES = ["a.png", "b b,=.JPG", "deep/er/c\nc.webp", "deep/\udcff.png"]  # the last one is no Unicode


def model(seed: int = 0) -> CoCa:
    torch.manual_seed(seed)
    return create_model("coca_tiny").eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    for i, name in enumerate(NAMES):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        render(i, size=40).save(photos / name)
    (photos / "notes.txt").write_text("no image")
    (photos / ".thumbnails").mkdir()
    render(9).save(photos / ".thumbnails" / "hidden.png")
    return photos


@torch.no_grad()
def naive(model: CoCa, path: Path) -> Tensor:
    return model.encode_image(build_transform(size=32)(Image.open(path))[None])[0]


def indexed(folder: Path, seed: int = 0) -> ImageIndex:
    index = ImageIndex(model(seed), folder)
    index.update(batch_size=3)
    return index


def test_features_are_those_of_the_images_one_by_one(folder: Path) -> None:
    index = indexed(folder)
    assert index.paths == sorted(folder / name for name in NAMES)
    torch.testing.assert_close(index.features, torch.stack([naive(index.model, path) for path in index.paths]))


@torch.no_grad()
def test_query_by_text_and_by_image(folder: Path) -> None:
    index = indexed(folder)
    text = index.model.encode_text(index.model.tokenizer(["a red circle"]))[0]
    best = max(index.paths, key=lambda path: float(naive(index.model, path) @ text))
    hits = index.query("a red circle", k=3)
    assert [type(hit) for hit in hits] == [Hit] * 3
    assert hits[0].path == best
    assert hits[0].score == pytest.approx(float(naive(index.model, best) @ text), abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    score, path = index.query(Image.open(folder / NAMES[1]))[0]
    assert (path, score) == (folder / NAMES[1], pytest.approx(1))
    assert len(index.query("a red circle", k=99)) == len(index) == len(NAMES)


def test_update_computes_only_what_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = indexed(folder)
    seen: list[int] = []
    encode = index.model.encode_image
    monkeypatch.setattr(index.model, "encode_image", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    assert index.update() == ([], [], [], {})
    assert seen == []
    render(20).save(folder / "new.png")
    render(21).save(folder / "a.png")
    (folder / NAMES[2]).unlink()
    (folder / "broken.jpg").write_bytes(b"")
    os.symlink("nowhere", folder / "link.png")
    added, changed, removed, unreadable = index.update()
    assert (added, changed, removed) == ([folder / "new.png"], [folder / "a.png"], [folder / NAMES[2]])
    assert set(unreadable) == {folder / "broken.jpg", folder / "link.png"}
    assert seen == [2]
    assert index.paths == indexed(folder).paths
    torch.testing.assert_close(index.features, indexed(folder).features)
    (folder / "a.png").write_bytes(b"broken now")
    again = index.update()
    assert folder / "a.png" in again.unreadable
    assert again.removed == [folder / "a.png"]  # so that the index is saved without it
    assert folder / "a.png" not in index.paths
    assert index.update().removed == []


def test_what_is_embedded_when_it_is_interrupted_stays(folder: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    index = ImageIndex(indexed(folder).model, folder)
    with pytest.raises(KeyboardInterrupt):
        index.update(batch_size=2, progress=interrupt)
    assert len(index) == 4
    added, changed, removed, _ = index.update()
    assert (len(added), changed, removed) == (len(NAMES) - 4, [], [])
    torch.testing.assert_close(index.features, indexed(folder).features)


def test_what_is_embedded_is_saved_now_and_then_and_where_a_worker_is_killed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, saved, embed = ImageIndex(indexed(folder).model, folder), list[int](), ImageIndex._embed

    def killed(*given: Any) -> Iterator[Any]:
        yield from islice(embed(*given), 2)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(ImageIndex, "_embed", killed)
    with pytest.raises(DataError, match=r"worker \(process 7\) ended"):
        refresh(index, lambda: saved.append(len(index)), batch_size=1)
    monkeypatch.setattr(ImageIndex, "_embed", embed)
    monkeypatch.setattr(search_index, "SAVE_EVERY", 0.0)
    refresh(index, lambda: saved.append(len(index)), batch_size=1)
    assert saved == [2, 3, 4]
    torch.testing.assert_close(index.features, indexed(folder).features)


def test_an_index_is_beside_the_folder_however_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "photos" / "deep")
    for name in ("..", "../deep/..", str(tmp_path / "photos"), f"{tmp_path}/photos/"):
        assert index_file(Path(name)) == tmp_path / "photos.index.safetensors"


def test_file_keeps_everything_and_moves_with_its_folder(folder: Path, tmp_path: Path) -> None:
    index = indexed(folder)
    index.save(tmp_path / "photos.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "photos.safetensors"}
    shutil.move(tmp_path / "photos", tmp_path / "elsewhere" / "photos")
    shutil.move(tmp_path / "photos.safetensors", tmp_path / "elsewhere" / "photos.safetensors")
    moved = ImageIndex.load(tmp_path / "elsewhere" / "photos.safetensors", index.model)
    assert moved.paths == [tmp_path / "elsewhere" / path.relative_to(tmp_path) for path in index.paths]
    assert torch.equal(moved.features, index.features)
    assert moved.update() == ([], [], [], {})


def test_an_index_moves_with_a_folder_above_the_current_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    index = indexed(Path("../photos"))
    for name in ("a.safetensors", "../here/../b.safetensors"):  # the second is beside the folder
        index.save(name)
    assert ImageIndex.load("a.safetensors", index.model).folder == folder
    shutil.move(folder, tmp_path / "elsewhere" / "photos")
    shutil.move(tmp_path / "b.safetensors", tmp_path / "elsewhere" / "b.safetensors")
    moved = ImageIndex.load(tmp_path / "elsewhere" / "b.safetensors", index.model)
    assert moved.folder == tmp_path / "elsewhere" / "photos"


def test_mistakes_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    index = indexed(folder)
    assert ImageIndex(index.model, folder).query("a red circle") == []  # before any update
    index.save(tmp_path / "index.safetensors")
    with pytest.raises(DataError, match=r"index\.safetensors"):
        ImageIndex.load(tmp_path / "index.safetensors", model(seed=1))
    with pytest.raises(DataError, match="absent"):
        ImageIndex(index.model, tmp_path / "absent").update()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty.*\.jpg"):
        ImageIndex(index.model, tmp_path / "empty").update()
    (tmp_path / "empty" / "x.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"empty.*x\.png"):
        ImageIndex(index.model, tmp_path / "empty").update()
    with pytest.raises(DataError, match=r"a\.png/x"):
        index.save(folder / "a.png" / "x")
    for nothing in ("🐕", "?!..."):  # which the model would read as the empty text
        with pytest.raises(ValueError, match=r"has no word that the model knows"):
            index.query(nothing)
        check_query(get_tokenizer("clip"), nothing)  # byte pairs know every character


def test_clip_has_an_index_of_its_own(folder: Path, tmp_path: Path) -> None:
    text = {"context_length": 12, "text_width": 16, "text_layers": 1, "text_heads": 2}
    vision = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}

    def clip(quick_gelu: bool) -> CLIP:
        torch.manual_seed(0)
        made = CLIP(image_encoder_args=vision, image_size=32, embed_dim=16, quick_gelu=quick_gelu, **text).eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return made

    index = ImageIndex(clip(quick_gelu=True), folder)
    index.update()
    assert index.query("a dog on a beach", k=1)[0].path in index.paths
    index.save(tmp_path / "clip.safetensors")
    assert len(ImageIndex.load(tmp_path / "clip.safetensors", clip(quick_gelu=True))) == len(NAMES)
    with pytest.raises(DataError, match="made with another model"):  # the same weights mean something else
        ImageIndex.load(tmp_path / "clip.safetensors", clip(quick_gelu=False))

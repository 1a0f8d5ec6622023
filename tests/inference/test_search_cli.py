"""`coca-search` from its configuration to what it prints, and what it computes again and what not."""

import sys
from pathlib import Path

import pytest
from applying import new_model, run

from coca_lit import save_model
from coca_lit.cli import search as search_cli
from coca_lit.data.scenes.render import render
from coca_lit.errors import ConfigError, DataError
from coca_lit.inference.search import ImageIndex


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_model(new_model(), tmp_path / "tiny.safetensors")
    (tmp_path / "photos").mkdir()
    for i in range(5):
        render(i * 37, size=40).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "zero.jpg").write_bytes(b"")
    return tmp_path


def search(*words: str) -> list:
    return run("search", "checkpoint=tiny.safetensors", "num_workers=0", *words)


def test_folder_is_embedded_once(folder: Path, capsys: pytest.CaptureFixture) -> None:
    hits = search("index=photos", "query=a red circle", "k=3")
    index = ImageIndex(new_model(), "photos")
    index.update()
    assert hits == index.query("a red circle", k=3)
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"{score:.4f}\t{path}" for score, path in hits]
    assert "skipped: photos/zero.jpg is not a readable image" in said.err
    assert "photos.index.safetensors: 5 images (5 added, 0 changed, 0 removed)" in said.err
    before = Path("photos.index.safetensors").stat().st_mtime_ns
    (best, *_) = search("index=photos", "query=photos/3.png")
    assert best.path == Path("photos/3.png")
    assert Path("photos.index.safetensors").stat().st_mtime_ns == before
    render(99).save("photos/new.png")
    assert Path("photos/new.png") in {hit.path for hit in search("index=photos", "query=a red circle", "k=99")}


def test_index_in_a_file(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert search("index=i.safetensors", "images=photos") == []
    assert capsys.readouterr().out == ""
    render(99).save("photos/new.png")
    assert len(search("index=i.safetensors", "query=a red circle")) == 5  # as it is
    search("index=i.safetensors")  # brought up to date
    assert len(search("index=i.safetensors", "query=a red circle")) == 6
    Path("photos").rename("moved")
    assert len(search("index=i.safetensors", "images=moved", "query=a red circle")) == 6


def test_words_of_the_command(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["coca-search", "photos", "a red circle", "checkpoint=tiny.safetensors", "num_workers=0", "k=2"]
    monkeypatch.setattr(sys, "argv", words)
    search_cli.search()
    printed = capsys.readouterr().out
    hits = search("index=photos", "query=a red circle", "k=2")
    assert printed.splitlines() == [f"{score:.4f}\t{path}" for score, path in hits]
    assert {path.name for path in folder.iterdir()} == {"photos", "photos.index.safetensors", "tiny.safetensors"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "index=absent",
            "^expected a folder of images or an index file first, found 'absent'; for example: coca-search ",
        ),
        ("index=red query=photos", r"^expected .*, found 'red'; did you mean: coca-search photos red$"),
        ("index=photos/zero.jpg query=photos", r"did you mean: coca-search photos photos/zero\.jpg$"),
        ("index=i.safetensors images=absent", "^there is no folder 'absent'"),
        ("index=photos images=photos", r"^index: 'photos' is a folder; with images=FOLDER it is the file of the index"),
        ("index=tiny.safetensors query=red", "^'tiny.safetensors' is not an image index"),
        ("index=photos query=absent.jpg", r"^query: there is no image 'absent\.jpg'"),
        ("index=photos query=photos/zero.jpg", r"^photos/zero\.jpg is not a readable image"),
        ("index=photos query=dog", "^query: the model's vocabulary has no 'dog'"),
        ("index=photos query=''", "^query: the query is empty"),
        ("index=photos query=red k=0", "^query: k must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_sentence(words: str, said: str, folder: Path) -> None:
    with pytest.raises((DataError, ConfigError), match=said) as caught:
        search(*words.split())
    assert "\n" not in str(caught.value)


def test_index_of_another_model(folder: Path) -> None:
    search("index=photos")
    save_model(new_model(seed=1), "tiny.safetensors")
    with pytest.raises(DataError, match=r"photos\.index\.safetensors was made with another model: build it again"):
        search("index=photos", "query=red")

"""`coca-search` from its configuration to what it prints, and what it computes again and what not."""

import re
import sys
from pathlib import Path

import pytest

from coca_lit import save_model
from coca_lit.data.scenes.render import render
from coca_lit.errors import ConfigError, DataError
from coca_lit.tools.search import command as search_cli
from coca_lit.tools.search.index import ImageIndex
from helpers.applying import new_model, run


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
    found = search("index=photos", "query=photos/3.png", "k=4")
    assert {hit.path.name for hit in found} == {"0.png", "1.png", "2.png", "4.png"}  # not the query itself
    assert Path("photos.index.safetensors").stat().st_mtime_ns == before
    render(99).save("photos/new.png")
    assert Path("photos/new.png") in {hit.path for hit in search("index=photos", "query=a red circle", "k=99")}


def test_a_place_that_nobody_writes_to(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(index: ImageIndex, path: Path) -> None:
        raise DataError(f"cannot write {path}")

    monkeypatch.setattr(ImageIndex, "save", save)
    assert len(search("index=photos", "query=a red circle", "k=3")) == 3
    assert re.search(r"not saved \(cannot write .*\): .*index=FILE.safetensors images=photos", capsys.readouterr().err)
    with pytest.raises(DataError, match="cannot write"):
        search("index=photos")  # nothing else was asked for


def test_a_strangers_index_leads_to_no_folder_elsewhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    search("index=downloads/i.safetensors", "images=photos")
    before = (tmp_path / "downloads" / "i.safetensors").read_bytes()
    (tmp_path / "photos" / "secret.png").write_bytes((tmp_path / "photos" / "1.png").read_bytes())
    with pytest.raises(ConfigError, match=rf"does not lie beside it: .* images={tmp_path}/photos$"):
        search("index=downloads/i.safetensors")
    assert (tmp_path / "downloads" / "i.safetensors").read_bytes() == before
    assert len(search("index=downloads/i.safetensors", "query=a red circle", "k=99")) == 5  # without reading it
    search("index=downloads/i.safetensors", f"images={tmp_path}/photos")
    assert (tmp_path / "downloads" / "i.safetensors").read_bytes() != before


def test_a_query_that_is_cut_is_said(folder: Path, capsys: pytest.CaptureFixture) -> None:
    search("index=photos", "query=a red circle")
    assert "note" not in capsys.readouterr().err
    room = new_model().tokenizer.context_length - 2
    assert len(search("index=photos", f"query={'red ' * (room + 3)}", "k=2")) == 2
    assert (
        f"note: the query has {room + 3} tokens, of which the model reads the first {room}" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_index_in_a_file(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert search("index=i.safetensors", "images=photos") == []
    assert capsys.readouterr().out == ""
    render(99).save("photos/new.png")
    assert len(search("index=i.safetensors", "query=a red circle")) == 5  # as it is
    search("index=i.safetensors")  # brought up to date
    assert len(search("index=i.safetensors", "query=a red circle")) == 6
    Path("photos").rename("moved")
    assert len(search("index=i.safetensors", "images=moved", "query=a red circle")) == 6


def test_ctrl_c_is_one_word(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageIndex, "query", interrupted)
    monkeypatch.setattr(sys, "argv", ["coca-search", "photos", "red", "checkpoint=tiny.safetensors", "num_workers=0"])
    with pytest.raises(SystemExit) as stopped:
        search_cli.search()
    assert stopped.value.code == 130
    assert {path.name for path in folder.iterdir()} == {"photos", "photos.index.safetensors", "tiny.safetensors"}
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("index=absent", "'absent'.*for example: coca-search"),
        ("index=red query=photos", "'red'.*did you mean: coca-search photos red$"),
        ("index=photos/zero.jpg query=photos", r"coca-search photos photos/zero\.jpg$"),
        ("index=i.safetensors images=absent", "'absent'"),
        ("index=photos images=photos", "^index: 'photos'"),
        ("index=tiny.safetensors query=red", r"'tiny\.safetensors'"),
        ("index=tiny.safetensors images=photos", r"'tiny\.safetensors'"),
        ("index=photos query=absent.jpg", r"^query: .*'absent\.jpg'"),
        ("index=photos query=photos/zero.jpg", r"^photos/zero\.jpg"),
        ("index=photos query=dog", "^query: .*'dog'"),
        (f"index=photos query={'dog' * 100}", "^query: .*'dogdog"),
        (f"index={'dog' * 100} query=photos", "did you mean: coca-search photos dogdog"),
        (f"index=photos query={'dog' * 100}.jpg", "^query: there is no image 'dogdog"),
        ("index=photos query=''", "^query: "),
        ("index=photos query=red k=0", "^query: k .*0"),
    ],
)
def test_mistakes_are_one_sentence(words: str, said: str, folder: Path) -> None:
    with pytest.raises((DataError, ConfigError), match=said) as caught:
        search(*words.split())
    assert "\n" not in str(caught.value)

"""Own photos: every layout gives the same records, and nothing outside of the folder is read."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from coca_lit.data.datasets.folder import captions_beside, folder_records, folder_training_captions
from coca_lit.data.records import ImageFile
from coca_lit.data.scenes.render import render
from coca_lit.errors import DataError

CAPTIONS = {f"{i}.jpg": (f"picture {i}, large", f"number {i}") for i in range(10)}
ROWS = [(name, caption) for name, captions in CAPTIONS.items() for caption in captions]
OBJECTS = [{"file": name, "caption": caption} for name, caption in ROWS]


def table(delimiter: str, head: str = "file{}caption", quote: str = '"') -> str:
    rows = (f"{name}{delimiter}{quote}{caption}{quote}" for name, caption in ROWS)
    return "\n".join([head.format(delimiter), *rows])


LAYOUTS = {
    "captions.csv": table(","),
    "captions.csv with ;": table(";", "\ufefffilename{}text"),
    "captions.csv of Excel": table(";", "\ufeffsep=;\n\n File{}Caption "),
    "captions.csv that names a sign": table("|", '"sep=|"\nfile{}caption'),
    "captions.csv of pandas": "\n".join([",file,caption", *(f'{i},{n},"{c}"' for i, (n, c) in enumerate(ROWS))]),
    "captions.jsonl with folder": "\n".join(json.dumps({"path": f"FOLDER/{n}", "caption": c}) for n, c in ROWS),
    "captions.tsv": table("\t", quote=""),
    "captions.jsonl": "\n".join(map(json.dumps, OBJECTS)),
    "captions.jsonl in UTF-16": "\n".join(map(json.dumps, OBJECTS)),
    "captions.json in UTF-16": json.dumps(OBJECTS),
    "captions.json": json.dumps([{"image": name, "captions": captions} for name, captions in CAPTIONS.items()]),
    "captions.json of COCO": json.dumps(
        {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(CAPTIONS)],
            "annotations": [{"image_id": [*CAPTIONS].index(name), "caption": text} for name, text in ROWS],
        }
    ),
    "": "",
}


def fill(root: Path, names: object = tuple(CAPTIONS)) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):  # type: ignore[call-overload]
        render(i, size=48).save(root / name)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str) -> None:
    fill(tmp_path / "images")
    if layout:
        content = LAYOUTS[layout].replace("FOLDER", f"{tmp_path}/images")  # as `coca-caption FOLDER` writes it
        (tmp_path / layout.split()[0]).write_text(content, encoding=(layout.split(" in ")[1:] or ["utf-8"])[0])
    else:
        for name, captions in CAPTIONS.items():
            (tmp_path / "images" / name).with_suffix(".txt").write_text("\n\n".join(captions))
        (tmp_path / "__MACOSX").mkdir()
        for name in ("._0.jpg", "._0.txt"):  # as an unpacked .zip of macOS has them
            (tmp_path / "__MACOSX" / name).write_text("no photo")
    records = {split: folder_records(tmp_path, split) for split in ("train", "val")}
    assert {split: len(found) for split, found in records.items()} == {"train": 9, "val": 1}
    found = {Path(str(r.id)).name: r for r in records["train"] + records["val"]}
    assert {name: record.captions for name, record in found.items()} == CAPTIONS
    assert found["3.jpg"].image == ImageFile(tmp_path / "images" / "3.jpg")
    assert len(folder_training_captions(tmp_path)) == 18


def test_a_split_that_is_given(tmp_path: Path) -> None:
    fill(tmp_path)
    rows = [
        {**row, " Split": {"0": "Validation", "1": "test", "2": ""}.get(row["file"][0], "train")} for row in OBJECTS
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [r.id for r in folder_records(tmp_path, "val")] == ["0.jpg"]
    assert [r.id for r in folder_records(tmp_path, "test")] == ["1.jpg"]
    assert [r.id for r in folder_records(tmp_path, "train")] == [f"{i}.jpg" for i in range(2, 10)]
    rows[0][" Split"] = "test"  # and the second row of the photo says val
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="test and val"):
        folder_records(tmp_path, "val")


def test_photos_that_look_alike_are_on_one_side(tmp_path: Path) -> None:
    for i in range(30):
        photo = render(i % 15, size=96)
        photo.resize((96 - i, 96 - i)).save(tmp_path / f"{i:02}.jpg", quality=70)
        (tmp_path / f"{i:02}.txt").write_text(f"picture {i}")
    held = [int(Path(str(record.id)).stem) for record in folder_records(tmp_path, "val")]
    assert 2 <= len(held) <= 6
    assert {(i + 15) % 30 for i in held} == set(held)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("captions.csv", "a,b\n1.jpg,x\n", "image.*but a, b"),
        ("captions.csv", "file,caption\n1.jpg,x,\n1.jpg,a dog, running\n", "line 3 .* 2 columns: put .*',' in quotes"),
        ("captions.csv", "file;caption\n1.jpg;a dog; a cat\n", "line 2 .*';' in quotes"),
        (
            "captions.csv",
            "file,caption,\n1.jpg,a dog,\n1.jpg,a dog, running\n",
            "line 3 .* 2 columns: put .*',' in quotes",
        ),
        (
            "captions.csv",
            "file,caption,, \n1.jpg,x,,\n1.jpg,a dog, running,\n",
            "line 3 .* 2 columns: put .*',' in quotes",
        ),
        ("captions.csv", "file,caption\n../1.jpg,x\n", "not relative to the folder"),
        ("captions.csv", "file,caption\nnone.jpg,x\n", "1 of 1"),
        ("captions.csv", f"file,caption\n{'x' * 300}.jpg,x\n", "1 of 1"),
        ("captions.csv", "file,caption,split\n1.jpg,x,later\n", "'later'"),
        ("captions.csv", 'file,caption\n"1.jpg', "quotes closed"),
        ("captions.tsv", 'file\tcaption\n1.jpg\t"x\n1.jpg\ty\n', "quotes closed"),
        ("captions.csv", "file,caption,caption\n1.jpg,x,y\n", "several columns caption"),
        ("captions.csv", "image,file,caption\n1.jpg,1.jpg,x\n", "columns image and file, of which either may be meant"),
        ("captions.csv", "file,caption,text\n1.jpg,x,y\n", "columns caption and text, of which either may be meant"),
        ("captions.csv", "file,caption,set\n1.jpg,x,test\n", "has the column 'set' with 'test': call it split"),
        (
            "captions.csv",
            "file,caption,Partition\n1.jpg,x,train\n",
            "the column 'Partition' with 'train': call it split",
        ),
        ("captions.csv", "file,caption\n1.jpg,\"['x', 'y']\"\n", "list in one field, .*'y'.*: write a row per caption"),
        ("captions.json", "[1]", "schema"),
        ("captions.json", '[{"file": 7, "caption": "x"}]', "7"),
        ("captions.json", '{"images": []}', "annotations"),
        (
            "captions.json",
            '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": "1", "caption": "x"}]}',
            "no image has the image_id of a caption, such as '1'",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    fill(tmp_path, ["1.jpg"])
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        folder_records(tmp_path, "train")


def test_two_ways_to_write_a_name_are_one_photo(tmp_path: Path) -> None:
    fill(tmp_path, ["1.jpg", "2.jpg"])
    rows = ("1.jpg,[Music],train", "./1.jpg,a cat,train", "2.jpg,a bird,val")
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption,split", *rows]))
    (record,) = folder_records(tmp_path, "train")
    assert record.captions == ("[Music]", "a cat")


def test_photos_without_a_caption_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS[:-2], ("9.jpg", "")]
    (fill(tmp_path) / "captions.csv").write_text("file,caption\n" + "\n".join(f'{f},"{text}"' for f, text in rows))
    assert sum(len(folder_records(tmp_path, split)) for split in ("train", "val")) == 9
    assert caplog.text.count("left out 1 of 10 photos") == 1


def test_texts_of_windows_are_read_and_others_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    for name in CAPTIONS:
        (tmp_path / name).with_suffix(".txt").write_bytes("Straße\r\nein Haus".encode("utf-16"))
    assert {record.captions for record in folder_records(tmp_path, "train")} == {("Straße", "ein Haus")}
    (tmp_path / "captions.csv").write_bytes("file,caption\n0.jpg,Straße\n1.jpg,Haus".encode("utf-16"))
    assert sorted(sum((record.captions for record in folder_records(tmp_path, "train")), ())) in (["Haus"], ["Straße"])
    (tmp_path / "captions.csv").unlink()
    (tmp_path / "3.txt").write_bytes("café".encode("cp1252"))
    with pytest.raises(DataError, match=r"3\.txt is not in UTF-8"):
        folder_records(tmp_path, "train")


def test_suffixes_may_be_upper_case(tmp_path: Path) -> None:
    fill(tmp_path, ("a.PNG", "b.png"))
    (tmp_path / "a.TXT").write_text("a dog")
    (tmp_path / "b.txt").write_text("a cat")
    found = captions_beside(tmp_path, (".png",))
    assert [(name, captions) for name, captions, _ in found] == [("a.PNG", ("a dog",)), ("b.png", ("a cat",))]


def test_several_captions_go_before_one(tmp_path: Path) -> None:
    """As `coca-caption` writes them, and where some rows have one alone."""
    rows = {name: {"path": name, "caption": "one", "captions": ["one", "two"], "file": [1, 2]} for name in CAPTIONS}
    for name, given in (("0.jpg", {}), ("1.jpg", {"captions": []})):
        rows[name] = {"path": name, "caption": "mine"} | given
    (fill(tmp_path, CAPTIONS) / "captions.jsonl").write_text("\n".join(map(json.dumps, rows.values())))
    found = {Path(str(r.id)).name: r.captions for split in ("train", "val") for r in folder_records(tmp_path, split)}
    assert {found.pop("0.jpg"), found.pop("1.jpg")} == {("mine",)}
    assert {*found.values()} == {("one", "two")}
    for name, caption in (("3.jpg", ""), ("4.jpg", "four")):  # taken out; of another program
        rows[name]["caption"] = caption
    del rows["4.jpg"]["file"], rows["5.jpg"]["caption"]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows.values())))
    found = {Path(str(r.id)).name: r.captions for split in ("train", "val") for r in folder_records(tmp_path, split)}
    assert (found.pop("0.jpg"), found.pop("1.jpg")) == (("mine",), ("mine",))
    assert {*found.values()} == {("one", "two")}
    for corrected in ({"caption": "three"}, {"captions": ["three", "four"]}):  # nobody knows which of the two is right
        changed = rows | {"2.jpg": rows["2.jpg"] | corrected}
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, changed.values())))
        with pytest.raises(DataError, match=r"2\.jpg"):
            folder_records(tmp_path, "train")
    lists = [{"path": name, "captions": ["one", "two"], "file": [1, 2]} for name in CAPTIONS]  # as that error advises
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lists)))
    assert {record.captions for record in folder_records(tmp_path, "train")} == {("one", "two")}


def test_files_of_rows_without_a_caption_need_not_be_there(tmp_path: Path) -> None:
    rows = [*(f"{name},a photo" for name in CAPTIONS), *(f"later{i}.jpg," for i in range(9)), "/elsewhere/x.jpg,"]
    (fill(tmp_path, CAPTIONS) / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    assert len(folder_records(tmp_path, "train")) == 9


@pytest.mark.parametrize("base", ["mine", "photos/mine", "{absolute}"])
def test_names_as_coca_caption_writes_them(tmp_path: Path, base: str) -> None:
    """Below the folder by the name that it was given, also where a folder in it has the same one."""
    root = tmp_path / "photos" / "mine"
    files = fill(root, CAPTIONS), fill(root / "mine", CAPTIONS)
    names = [str(path.relative_to(root)) for folder in files for path in folder.glob("*.jpg")]
    rows = [{"path": f"{base.format(absolute=root)}/{name}", "caption": name} for name in names]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for record in folder_records(root, "train"):
        assert record.image == ImageFile(root / record.captions[0])


def test_names_of_several_kinds_in_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where somebody adds a row by hand to what `coca-caption` wrote, or links to the folder."""
    root = fill(tmp_path / "photos", CAPTIONS)
    (tmp_path / "link").symlink_to(root)
    starts = ["photos/", "", f"{root}/", "link/"]
    rows = [f"{starts[i % 3]}{name},{name}" for i, name in enumerate(CAPTIONS)]
    (root / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    records = folder_records(root, "train")
    assert len(records) == 9
    assert all(record.image == ImageFile(root / record.captions[0]) for record in records)
    split = [f"photos/{name},{name},train" for name in CAPTIONS]
    (root / "captions.csv").write_text("\n".join(["file,caption,split", *split, "0.jpg,by hand,"]))
    assert folder_records(root, "train")[0].captions == ("0.jpg", "by hand")
    (root / "captions.csv").write_text("\n".join(["file,caption,split", *split, "0.jpg,by hand,val"]))
    with pytest.raises(DataError, match="train and val"):
        folder_records(root, "train")
    rows = [f"{starts[3]}{name},{name}" for name in CAPTIONS]
    (root / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    assert len(folder_records(tmp_path / "link", "train")) == 9
    monkeypatch.chdir(tmp_path)
    assert len(folder_records("link", "train")) == 9
    for name in ("../secret.jpg", f"{tmp_path}/secret.jpg", "photos/../../secret.jpg"):
        (root / "captions.csv").write_text("\n".join(["file,caption", *rows, f"{name},a secret"]))
        fill(tmp_path, ["secret.jpg"])
        with pytest.raises(DataError, match="not relative to the folder"):
            folder_records("link", "train")


def test_names_that_are_right_as_they_are(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    fill(root, CAPTIONS)
    fill(root / "mine", CAPTIONS)
    rows = "\n".join(f"mine/{name},a photo" for name in CAPTIONS)
    (root / "captions.csv").write_text(f"file,caption\n{rows}")
    assert {record.image.path.parent for record in folder_records(root, "train")} == {root / "mine"}  # type: ignore[attr-defined]


def test_columns_in_capitals(tmp_path: Path) -> None:
    fill(tmp_path, CAPTIONS)
    (tmp_path / "captions.csv").write_text("Caption,file,caption\n" + "\n".join(f"no,{n},yes" for n in CAPTIONS))
    assert {record.captions for record in folder_records(tmp_path, "train")} == {("yes",)}


def test_a_photo_that_the_disk_does_not_give_is_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, CAPTIONS)
    rows = "\n".join(f"{name},a photo,{'val' if name < '5.jpg' else 'train'}" for name in CAPTIONS)
    (tmp_path / "captions.csv").write_text(f"file,caption,split\n{rows}")
    real = os.open

    def failing(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("2.jpg"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(DataError, match="Input/output error"):
        folder_records(tmp_path, "val")
    faults = iter([OSError(errno.EIO, "Input/output error")])

    def failing_once(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("3.jpg"):
            for fault in faults:
                raise fault
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing_once)
    assert len(folder_records(tmp_path, "val")) == 5


def test_a_broken_photo_is_not_scored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In training another one replaces it; a validation would end the run after an epoch."""
    fill(tmp_path)
    for name in ("1.jpg", "5.jpg"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    rows = [f"{name},{'val' if name < '5.jpg' else 'train'},a photo" for name in CAPTIONS]
    (tmp_path / "captions.csv").write_text("\n".join(["file,split,caption", *rows]))
    assert [record.id for record in folder_records(tmp_path, "val")] == ["0.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert caplog.text.count("1 of 5 photos of 'val' cannot be decoded, e.g. 1.jpg") == 1
    assert len(folder_records(tmp_path, "train")) == 5
    for name in ("2.jpg", "3.jpg"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"3 of 5 photos of 'val' cannot be decoded"):
        folder_records(tmp_path, "val")


def test_described_files_of_other_formats_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    for name in (*CAPTIONS, "a.heic", "b.heic"):
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").write_text("a photo")
    for name in ("README.txt", "0.json"):
        (tmp_path / name).write_text("{}")
    assert sum(len(folder_records(tmp_path, split)) for split in ("train", "val")) == 10
    assert caplog.text.count("left out 2 files with a .txt") == 1
    assert "a.heic" in caplog.text


def test_a_broken_photo_in_the_layout_of_coco_is_not_scored(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    fill(tmp_path / "val2017", CAPTIONS)
    (tmp_path / "val2017" / "4.jpg").write_bytes(b"")
    (tmp_path / "annotations" / "captions_val2017.json").write_text(LAYOUTS["captions.json of COCO"])
    assert len(folder_records(tmp_path, "val")) == 9


def test_a_linked_folder_is_followed_neither_out_nor_twice(tmp_path: Path) -> None:
    for place in ("mine/inside", "other"):
        (fill(tmp_path / place, ["photo.jpg", "photo2.jpg"]) / "photo.txt").write_text("a photo")
    (tmp_path / "mine" / "again").symlink_to(tmp_path / "mine" / "inside")
    assert [name for name, captions, _ in captions_beside(tmp_path / "mine", (".jpg",)) if captions] == [
        "inside/photo.jpg"
    ]
    (tmp_path / "mine" / "linked").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match="linked is a link out"):
        [*captions_beside(tmp_path / "mine", (".jpg",))]


def test_links_out_are_not_followed(tmp_path: Path) -> None:
    fill(tmp_path / "other", ["secret.jpg"])
    (tmp_path / "other" / "secret.txt").write_text("a secret")
    for link in ("photo.jpg", "photo.txt"):
        mine = fill(tmp_path / f"mine {link}", ["photo.jpg"])
        (mine / "photo.txt").write_text("a photo")
        (mine / link).unlink()
        os.symlink(tmp_path / "other" / f"secret{Path(link).suffix}", mine / link)
        with pytest.raises(DataError, match="link out"):
            folder_records(mine, "train")
        with pytest.raises(DataError, match="link out"):
            [*captions_beside(mine, (".jpg",))]  # as `coca-data prepare` reads it


@pytest.mark.parametrize("link", ["captions.csv", "annotations", "train2017", "train2017/1.jpg"])
def test_links_out_of_layouts_are_not_followed(tmp_path: Path, link: str) -> None:
    listed = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a secret"}]}
    for root in (tmp_path / "other", tmp_path / "mine"):
        fill(root / "train2017", ["1.jpg"])
        (root / "annotations").mkdir()
        (root / "annotations" / "captions_train2017.json").write_text(json.dumps(listed))
    (tmp_path / "other" / "captions.csv").write_text("file,caption\ntrain2017/1.jpg,a secret")
    assert folder_records(tmp_path / "mine", "train")[0].captions == ("a secret",)
    if (tmp_path / "mine" / link).exists():
        (tmp_path / "mine" / link).rename(tmp_path / "aside")
    (tmp_path / "mine" / link).symlink_to(tmp_path / "other" / link)
    with pytest.raises(DataError, match="link out"):
        folder_records(tmp_path / "mine", "train")


def test_one_text_for_two_photos_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "a.PNG", "b.png"):
        render(1).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "b.txt").write_text("a cat")
    assert len(folder_records(tmp_path, "train", hold_out=False)) == 3
    assert "1 .txt in" in caplog.text
    assert "are the captions of several photos each, e.g. a.txt" in caplog.text


def test_accents_of_a_text_may_be_decomposed_beside_a_photo(tmp_path: Path) -> None:
    render(1).save(tmp_path / "cafe\u0301.png")
    (tmp_path / "caf\u00e9.txt").write_text("a dog")
    (record,) = folder_records(tmp_path, "train", hold_out=False)
    assert record.captions == ("a dog",)


def test_accents_may_be_decomposed_on_disk(tmp_path: Path) -> None:
    """As macOS archives them; the table is typed."""
    for typed, stored in (("caf\u00e9.jpg", "cafe\u0301.jpg"), ("u\u0308.jpg", "\u00fc.jpg")):
        root = fill(tmp_path / typed, [stored])
        (root / "captions.csv").write_text(f"file,caption,split\n{typed},a cup,train", encoding="utf-8")
        (record,) = folder_records(root, "train")
        assert (record.id, record.image) == (typed, ImageFile(root / stored))


@pytest.mark.parametrize(
    ("given", "asked", "advice"),
    [
        ("train", "val", r": set data\.val_split=null 'evals=\[\]'$"),
        ("train test", "val", ": set scoring.split=test data.val_split=test$"),
        ("train test val", "dev", ": set scoring.split=val data.val_split=val$"),
        ("test", "train", "but test$"),
    ],
)
def test_the_advice_for_a_missing_split_works(tmp_path: Path, given: str, asked: str, advice: str) -> None:
    fill(tmp_path, [f"{split}.jpg" for split in given.split()])
    rows = [f"{split}.jpg,a cup,{split}" for split in given.split()]
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption,split", *rows]))
    with pytest.raises(DataError, match=advice):
        folder_records(tmp_path, asked)


def test_folders_without_photos_captions_or_with_two_files(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(DataError, match="not found"):
            folder_records(folder, "train")
    fill(tmp_path)
    with pytest.raises(DataError, match="not found"):
        folder_records(tmp_path, "train")
    (tmp_path / "captions.csv").write_text(LAYOUTS["captions.csv"])
    with pytest.raises(DataError, match="no split 'test'"):
        folder_records(tmp_path, "test")
    (tmp_path / "captions.tsv").write_text(LAYOUTS["captions.tsv"])
    with pytest.raises(DataError, match="both"):
        folder_records(tmp_path, "train")


@pytest.mark.parametrize(("name", "delimiter"), [("labels.csv", ","), ("Photos 2024.tsv", "\t")])
def test_the_only_table_is_read_under_any_name(
    tmp_path: Path, name: str, delimiter: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)
    (tmp_path / name).write_text(table(delimiter))
    found = {r.id: r.captions for split in ("train", "val") for r in folder_records(tmp_path, split)}
    assert found == CAPTIONS
    assert f"captions are read from {name}, the only table in {tmp_path}" in caplog.text
    (tmp_path / "exif.csv").write_text("file,camera\n")
    with pytest.raises(DataError, match=r"tables .*exif\.csv.*: call the one with the captions captions"):
        folder_records(tmp_path, "train")
    (tmp_path / "captions.csv").write_text(table(","))
    assert len(folder_records(tmp_path, "train")) == 9


def test_texts_beside_photos_come_before_another_table(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "exif.csv").write_text("file,text\n0.jpg,f/2.8\n")
    for name in CAPTIONS:
        (tmp_path / name).with_suffix(".txt").write_text("beside")
    assert {r.captions for r in folder_records(tmp_path, "train")} == {("beside",)}


def test_photos_of_another_format_are_named_before_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)
    for i in (0, 1):
        (tmp_path / f"{i}.jpg").rename(tmp_path / f"{i}.HEIC")
    rows = [{**row, "file": row["file"].replace("0.jpg", "0.HEIC").replace("1.jpg", "1.HEIC")} for row in OBJECTS]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [r.id for split in ("train", "val") for r in folder_records(tmp_path, split)]
    assert sorted(map(str, found)) == [f"{i}.jpg" for i in range(2, 10)]
    assert f"2 of 10 photos in {tmp_path}, e.g. 0.HEIC: .heic is not read, convert them to .jpg" in caplog.text
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows[:4])))
    with pytest.raises(DataError, match=r"2 of 2 photos .* convert them to \.jpg"):
        folder_records(tmp_path, "train")


def test_a_table_of_windows_says_its_line_and_the_way_out(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "captions.csv").write_bytes("file,caption\n0.jpg,a dog\n1.jpg,ein Hund läuft\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"captions\.csv is not in UTF-8 \(line 3\).*iconv -f WINDOWS-1252"):
        folder_records(tmp_path, "train")

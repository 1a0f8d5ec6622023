"""`coca-caption` from its configuration to its output: each caption equals the model's for the image alone."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from coca_lit import save_model
from coca_lit.cli import runtime
from coca_lit.cli.words import quote
from coca_lit.data import pixels
from coca_lit.data.bad_samples import BadSamples
from coca_lit.data.datasets.folder import captions_beside
from coca_lit.data.scenes.render import render
from coca_lit.data.shards.scan import read_shard
from coca_lit.data.shards.shard import Shard as ShardFile
from coca_lit.errors import ConfigError, DataError
from coca_lit.models import CoCa
from coca_lit.models.inputs import preprocessing
from coca_lit.tools.caption import inputs
from coca_lit.tools.caption.inputs import Source, load_images
from coca_lit.tools.caption.outputs import Recaptioned
from coca_lit.tools.prepare.scenes import write_shards
from coca_lit.tools.score.results import read_results
from helpers.applying import caption, naive_captions, new_model

HOSTILE = ["a b,=.jpg", "k=v.png", "${x}.png", "new\nline\t.png", "\udcff.png", "-m.png", "sub/'\".JPEG"]


@pytest.fixture(scope="module")
def model() -> CoCa:
    return new_model()


@pytest.fixture(scope="module")
def checkpoint(model: CoCa, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(model, path)
    return f"checkpoint={path}"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of image that decodes to something, and two that do not."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        render(i * 37, size=48).save(folder / f"{i:02}.png")
    render(7, size=48).convert("L").save(folder / "grey.png")
    render(8, size=48).convert("CMYK").save(folder / "cmyk.jpg")
    render(9, size=48).convert("RGBA").save(folder / "alpha.webp")
    render(9, size=48).convert("P").save(folder / "palette.gif")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    render(10, size=48).rotate(90).save(folder / "turned.jpg", exif=turned, quality=95)
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "00.png").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, 15, 48, per_shard=6)
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def readable(photos: Path) -> list[Path]:
    return sorted(path for path in photos.iterdir() if path.stem not in ("zero", "cut"))


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_json_lines(model: CoCa, checkpoint: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    caption(checkpoint, f"images=[{photos}]", f"output={tmp_path}/new/c.jsonl", "batch_size=4")
    expected = [
        {
            "path": str(path),
            "caption": naive_captions(model, path)[0],
            "file": [path.stat().st_size, path.stat().st_mtime_ns],
        }
        for path in readable(photos)
    ]
    assert lines(tmp_path / "new" / "c.jsonl") == expected
    said = capsys.readouterr()
    assert said.out == ""
    assert f"skipped: {photos}/zero.jpg is not a readable image" in said.err
    assert f"skipped: {photos}/cut.png is not a readable image" in said.err
    assert "10 images in " in said.err
    assert " 2 unreadable" in said.err


def test_exif_rotation_is_applied(model: CoCa, photos: Path, tmp_path: Path) -> None:
    render(10, size=48).save(tmp_path / "upright.jpg", quality=95)
    paths = [photos / "turned.jpg", tmp_path / "upright.jpg"]
    batch = next(load_images([[Source(path.name, path) for path in paths]], preprocessing(32, "bicubic", "shortest")))
    difference = (batch.pixels[0].float() - batch.pixels[1].float()).abs().mean()
    assert difference < 2  # of 255; JPEG loses a little differently
    stored = (batch.pixels[0].rot90(1, (1, 2)).float() - batch.pixels[1].float()).abs().mean()
    assert stored > 10


def test_an_image_of_a_shard_that_vanished_is_named(tmp_path: Path) -> None:
    gone = Source("the first", tmp_path / "gone.tar", offset=512, size=100)
    batch = next(load_images([[gone]], preprocessing(32, "bicubic", "shortest")))
    assert not batch.positions
    assert "the first" in batch.broken[0]


def test_a_byte_more_than_the_limit_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render(10, size=48).save(tmp_path / "photo.png")
    size = (tmp_path / "photo.png").stat().st_size
    for limit, accepted in ((size, True), (size - 1, False)):
        monkeypatch.setattr(pixels, "MAX_IMAGE", limit)
        monkeypatch.setattr(inputs, "MAX_IMAGE", limit)
        part = Source("photo", tmp_path / "photo.png", offset=0, size=size)
        batch = next(load_images([[part]], preprocessing(32, "bicubic", "shortest")))
        assert bool(batch.positions) == accepted
    assert f"more than the {size - 1:,}" in batch.broken[0]


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "greedy", "max_length": 8},
        {"num_beams": 3, "num_captions": 2, "length_penalty": 0.5},
        {"prompt": "a small", "rerank": "contrastive", "rerank_weight": 0.2, "no_repeat_ngram": 2},
    ],
)
def test_standard_output_with_options(
    options: dict, model: CoCa, checkpoint: str, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [f"generate.{key}={value}" for key, value in options.items()]
    caption(checkpoint, f"images=[{photos}/00.png,'{photos}/0[12].png']", *words)
    paths = [photos / f"0{i}.png" for i in range(3)]
    expected = [f"{path}\t{text}" for path in paths for text in naive_captions(model, path, **options)]
    assert capsys.readouterr().out.splitlines() == expected


def test_hostile_file_names(checkpoint: str, tmp_path: Path) -> None:
    paths = [tmp_path / "photos" / name for name in HOSTILE]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        render(i).save(path)
    images = f"images=[{','.join(quote(str(path)) for path in paths)}]"
    caption(checkpoint, images, f"output={tmp_path}/c.jsonl")
    assert [row["path"] for row in lines(tmp_path / "c.jsonl")] == [str(path) for path in paths]


@pytest.mark.slow
def test_words_of_a_real_command(model: CoCa, checkpoint: str, tmp_path: Path) -> None:
    names = [os.fsencode(name) for name in HOSTILE if "/" not in name]
    for i, name in enumerate(names):
        render(i).save(os.path.join(tmp_path, os.fsdecode(name)))
    command = [sys.executable, "-m", "coca_lit.tools.caption", checkpoint, "num_workers=1", "precision=fp32"]
    done = subprocess.run([*command, *names[:-1], "--", names[-1]], cwd=tmp_path, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    expected = [naive_captions(model, tmp_path / os.fsdecode(name))[0].encode() for name in names]
    shown = [name.replace(b"\n", rb"\x0a").replace(b"\t", rb"\x09") for name in names]
    assert done.stdout.splitlines() == [b"%s\t%s" % pair for pair in zip(shown, expected, strict=True)]
    assert sorted(os.listdir(os.fsencode(tmp_path))) == sorted(names)  # no run folder, no log


@pytest.mark.slow
def test_coco_results(model: CoCa, checkpoint: str, tmp_path: Path) -> None:
    names = {"COCO_val2014_000000000042.jpg": 42, "000000000139.jpg": 139, "1000268201_693b08cb0e.jpg": None}
    names[f"{2**63}.jpg"] = None  # a number that is no id
    for i, name in enumerate(names):
        render(i).save(tmp_path / name)
    caption(checkpoint, f"images=[{tmp_path}]", f"output={tmp_path}/r.json", "batch_size=2")
    expected = {number or Path(name).stem: naive_captions(model, tmp_path / name)[0] for name, number in names.items()}
    assert read_results(tmp_path / "r.json") == expected
    render(9).save(tmp_path / "7.png")
    caption(checkpoint, f"images=[{tmp_path}]", f"output={tmp_path}/r.json", "batch_size=2")
    assert read_results(tmp_path / "r.json") == expected | {7: naive_captions(model, tmp_path / "7.png")[0]}
    assert {path.name for path in tmp_path.glob("r.*")} == {"r.json", "r.json.settings.json"}
    render(9).save(tmp_path / "COCO_val2014_000000000007.png")
    with pytest.raises(DataError, match=r"7\.png.*jsonl"):
        caption(checkpoint, f"images=[{tmp_path}]", f"output={tmp_path}/r.json")
    with pytest.raises(DataError, match="jsonl"):
        caption(checkpoint, f"images=[{tmp_path}]", f"output={tmp_path}/q.json", "generate.num_captions=2")


def test_a_folder_is_one_word_and_two_stars_are_any_depth(checkpoint: str, tmp_path: Path) -> None:
    for name in ("0.png", "a/1.png", "a/b/2.png"):
        (path := tmp_path / "x" / name).parent.mkdir(exist_ok=True)
        render(1, size=32).save(path)
    for images, output in ((f"{tmp_path}/x", "1.jsonl"), (f"'{tmp_path}/x/**/*.png'", "2.jsonl")):
        caption(checkpoint, f"images={images}", f"output={tmp_path}/{output}", "num_workers=0")
        names = [json.loads(line)["path"] for line in (tmp_path / output).read_text().splitlines()]
        assert names == [f"{tmp_path}/x/{name}" for name in ("0.png", "a/1.png", "a/b/2.png")]


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    scandir = os.scandir

    def refused(path: str) -> object:
        if Path(path).name in ("a", "lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match="a' cannot be listed: Permission denied"):
        inputs.find_images(tmp_path)
    with pytest.raises(DataError, match="a' cannot be listed: Permission denied"):
        [*captions_beside(tmp_path, (".jpg",))]
    (tmp_path / "a").rename(tmp_path / "lost+found")  # of a disk, which only the system may list
    assert inputs.find_images(tmp_path) == []


def test_links_out_of_a_folder_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for path in (folder / "a.jpg", tmp_path / "private.jpg"):
        path.touch()
    (folder / "more" / "b.jpg").symlink_to(folder / "a.jpg")
    for name, target in (("c.jpg", tmp_path / "private.jpg"), ("d.jpg", "../private.jpg"), ("e.jpg", "e.jpg")):
        (folder / name).symlink_to(target)
    assert inputs.find_images(folder) == [folder / "a.jpg", folder / "e.jpg", folder / "more" / "b.jpg"]
    assert f"left out 2 links out of {folder}, e.g. {folder}/c.jpg: copy the files there" in caplog.text


def test_photos_of_other_formats_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "more").mkdir()
    for name in ("a.jpg", "b.HEIC", "more/c.tif", ".d.heic", "notes.txt"):
        (tmp_path / name).touch()
    assert inputs.find_images(tmp_path) == [tmp_path / "a.jpg"]
    assert f"left out 2 photos in {tmp_path}: .heic, .tif is not read" in caplog.text


def test_a_mark_without_its_shard_is_none(tmp_path: Path) -> None:
    """Who deletes a shard of new captions wants it again, of whichever input now has its name."""
    (before, now, output) = (tmp_path / name for name in ("before", "now", "new"))
    for folder in (before, now, output):
        folder.mkdir()
    (before / "0.tar").write_bytes(b"1")
    (now / "0.tar").write_bytes(b"12")
    mark = {"path": str(before / "0.tar"), "file": [1, 0]}
    (output / ".0.tar.source.json").write_text(json.dumps(mark))
    assert not Recaptioned(output, [now / "0.tar"]).has_unit(now / "0.tar")
    (output / "0.tar").touch()
    with pytest.raises(DataError, match="was made of"):
        Recaptioned(output, [now / "0.tar"])


@pytest.mark.slow
def test_shards_keep_everything_but_the_caption(
    model: CoCa, checkpoint: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caption(checkpoint, f"images=[{shards}]", f"output={tmp_path}/new", "batch_size=4", "num_workers=1")
    paths = sorted(shards.glob("*.tar"))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "settings.json",
        *(name for path in paths for name in (path.name, f".{path.name}.source.json")),
    }
    for path in paths:
        before, after = members(path), members(tmp_path / "new" / path.name)
        assert list(after) == list(before)
        for name, content in before.items():
            stem = name.removesuffix(".jpg").removesuffix(".txt").removesuffix(".json")
            if name.endswith(".jpg"):
                assert after[name] == content
                (tmp_path / "one.jpg").write_bytes(content)
                assert after[f"{stem}.txt"].decode() == naive_captions(model, tmp_path / "one.jpg")[0]
            if name.endswith(".json"):
                original = {"original_caption": before[f"{stem}.txt"].decode()}
                assert json.loads(after[name]) == json.loads(content) | original
        for key, source in (("txt", after), ("original_caption", before)):  # training reads the new and the old caption
            samples = read_shard(ShardFile(str(tmp_path / "new" / path.name)), [key], BadSamples(0))
            texts = [content.decode() for name, content in source.items() if name.endswith(".txt")]
            assert [sample.captions for sample in samples] == [(text,) for text in texts]
    # Rewritten, a shard is the same, byte for byte; captioned once more it still has the first caption.
    first = (tmp_path / "new" / "00000.tar").read_bytes()
    (tmp_path / "new" / "00000.tar").unlink()
    caption(checkpoint, f"images=[{shards}]", f"output={tmp_path}/new", "batch_size=4")
    assert (tmp_path / "new" / "00000.tar").read_bytes() == first
    again = ["generate.strategy=sample", "generate.num_captions=3"]
    caption(checkpoint, f"images=[{tmp_path}/new/00000.tar]", f"output={tmp_path}/again/", *again)
    before, after = members(paths[0]), members(tmp_path / "again" / "00000.tar")
    name = next(name for name in before if name.endswith(".json"))
    fields = json.loads(after[name])
    assert fields["original_caption"] == json.loads(before[name])["caption"]
    assert len(fields["generated_captions"]) == 3


def odd_shard(path: Path) -> None:
    def add(name: str, content: bytes, **fields: object) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        for field, value in fields.items():
            setattr(member, field, value)
        tar.addfile(member, io.BytesIO(content))

    buffer = io.BytesIO()
    render(1).save(buffer, "PNG")
    good = buffer.getvalue()
    with tarfile.open(path, "w") as tar:
        add("bare.PNG", good)
        add("broken.jpg", b"nothing")
        add("broken.txt", b"old")
        add("text.txt", b"no image")
        add("odd.json", b"{not json")
        add("odd.png", good)
        add("odd.seg.npy", b"\x93NUMPY")
        add("link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("last.png", good)


def test_odd_samples(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    odd_shard(tmp_path / "odd.tar")
    caption(checkpoint, f"images=[{tmp_path}/odd.tar]", f"output={tmp_path}/new/")
    after = members(tmp_path / "new" / "odd.tar")
    names = ["bare.json", "bare.png", "bare.txt", "odd.json", "odd.png", "odd.seg.npy", "odd.txt"]
    assert list(after) == [*names, "last.json", "last.png", "last.txt"]
    assert json.loads(after["bare.json"]) == {}
    assert json.loads(after["odd.json"]) == {"broken_json": "{not json"}
    assert after["odd.seg.npy"] == b"\x93NUMPY"
    assert f"skipped: {tmp_path}/odd.tar/broken is not a readable image" in capsys.readouterr().err
    whole = (tmp_path / "odd.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.rindex(b"last.png") + 600])
    with pytest.raises(DataError, match="broken or truncated: 1; what can be read of them is captioned"):
        caption(checkpoint, f"images=[{tmp_path}/cut.tar]", f"output={tmp_path}/new/")
    assert list(members(tmp_path / "new" / "cut.tar")) == names
    assert f"{tmp_path}/cut.tar" in capsys.readouterr().err


def test_a_member_that_leads_out_costs_no_other(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    render(1).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../x.png", "good.png"):
            tar.add(tmp_path / "a.png", name)
    with pytest.raises(DataError, match="broken or truncated: 1"):
        caption(checkpoint, f"images=[{tmp_path}/a.tar]", f"output={tmp_path}/new/")
    assert list(members(tmp_path / "new" / "a.tar")) == ["good.json", "good.png", "good.txt"]
    assert "the member '../x.png' leads out of the shard" in capsys.readouterr().err


def test_captions_of_another_model_do_not_stay(checkpoint: str, tmp_path: Path) -> None:
    render(1).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps({"generated_captions": ["old", "older"], "id": 7}))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.png", "a.json"):
            tar.add(tmp_path / name, name)
    caption(checkpoint, f"images=[{tmp_path}/a.tar]", f"output={tmp_path}/new/")
    assert json.loads(members(tmp_path / "new" / "a.tar")["a.json"]) == {"id": 7}


def test_a_key_that_comes_twice(
    model: CoCa, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two tars that were joined: the first image with that key has its own caption. The output may be a number."""
    monkeypatch.chdir(tmp_path)
    for i in (1, 5):
        render(i).save(f"{i}.png")
    with tarfile.open("two.tar", "w") as tar:
        for i, name in ((1, "one.png"), (5, "other.png"), (5, "one.png"), (5, "one.txt")):
            tar.add(f"{i}.png", name)
    with pytest.raises(DataError, match="broken or truncated: 1"):
        caption(checkpoint, "images=[two.tar]", "output=2024")
    after = members(Path("2024", "two.tar"))
    assert {name: after[name] for name in ("one.png", "other.png")} == {
        "one.png": Path("1.png").read_bytes(),
        "other.png": Path("5.png").read_bytes(),
    }
    for i, name in ((1, "one.txt"), (5, "other.txt")):
        assert after[name].decode() == naive_captions(model, Path(f"{i}.png"))[0]
    assert "two samples have the key 'one'" in capsys.readouterr().err


def test_output_is_continued_with_the_same_model_options_and_precision_only(
    checkpoint: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And samples, which depend on them, with the same batches."""
    same = (f"images=[{photos}/00.png]", f"output={tmp_path}/c.jsonl", "precision=auto")
    monkeypatch.setattr(runtime, "best_precision", lambda device: "32-true")
    caption(checkpoint, *same)
    caption(checkpoint, *same, "batch_size=2")
    with pytest.raises(DataError, match=r"c\.jsonl\.settings\.json.*num_beams=None.*num_beams=3"):
        caption(checkpoint, *same, "generate.num_beams=3")
    save_model(new_model(seed=1), tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"c\.jsonl\.settings\.json.*model=\w+.*model=\w+"):
        caption(f"checkpoint={tmp_path}/other.safetensors", *same)
    monkeypatch.setattr(runtime, "best_precision", lambda device: "bf16-mixed")
    with pytest.raises(DataError, match=r"c\.jsonl\.settings\.json.*precision=fp32.*precision=bf16"):
        caption(checkpoint, *same)
    sampled = (same[0], f"output={tmp_path}/sampled.jsonl", "generate.strategy=sample")
    caption(checkpoint, *sampled)
    with pytest.raises(DataError, match=r"batch_size=32, but now batch_size=2"):
        caption(checkpoint, *sampled, "batch_size=2")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("images=[]", r"\.jpg.*\.tar"),
        ("images=['{0..3}.tar']", "4 of 4"),
        ("images=[notes.txt]", r"notes\.txt.*'\.txt'"),
        ("images=[gone.png]", r"gone\.png.*nor a link"),
        ("images=['[gp]*.png']", r"gone\.png.*nor a link"),
        ("images=[pipe.png]", r"pipe\.png.*nor a link"),
        (f"images=['{{{'x' * 200},{'y' * 200}}}.png']", "there is no"),
        ("images=[a.png] output=c.csv", r"'\.csv'.*output=c\.csv"),
        ("images=[a.tar] output=notes", r"output=notes: .*a folder/"),
        ("images=[a.tar] output=notes/", r"output=notes/: .*a folder/"),
        ("images=[a.tar] output=.", r"a\.tar"),
        ("images=[a.tar,b/a.tar] output=new", r"a\.tar.*b/a\.tar.*new/a\.tar"),
        ("images=[a.png] output=notes.txt/c.jsonl", r"notes\.txt/c\.jsonl"),
        ("images=[a.png] batch_size=0", "batch_size.*0"),
        ("images=[a.png] generate.top_k=3", "^generate: top_k.*sample"),
        ("images=[a.png] generate.prompt=[a]", r"^generate: prompt must be one text.*\['a'\]"),
    ],
)
def test_mistakes_are_one_sentence(
    words: str, said: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "notes"):
        Path(name).write_text("text")
    os.mkfifo("pipe.png")
    Path("gone.png").symlink_to("nowhere.png")
    render(0).save("a.png")
    Path("b").mkdir()
    for path in ("a.tar", "b/a.tar"):
        tarfile.open(path, "w").close()
    with pytest.raises((DataError, ConfigError), match=said) as caught:
        caption(checkpoint, *words.split())
    assert "\n" not in str(caught.value)


def test_a_model_without_decoder(tmp_path: Path, photos: Path) -> None:
    save_model(new_model(decoder_layers=0), tmp_path / "clip.safetensors")
    with pytest.raises(ConfigError, match=r"^checkpoint: .*decoder"):
        caption(f"checkpoint={tmp_path}/clip.safetensors", f"images=[{photos}]")


def test_a_preset_means_its_options(checkpoint: str, photos: Path, capsys: pytest.CaptureFixture) -> None:
    def said(*words: str) -> str:
        caption(checkpoint, f"images=[{photos}/00.png,{photos}/01.png]", *words)
        return capsys.readouterr().out

    spelt = [f"generate.{word}" for word in ("strategy=sample", "top_p=0.9", "min_length=5", "cut_at=.")]
    assert said("generate.preset=mobileclip2") == said(*spelt) != said("generate.preset=mobileclip2", "seed=1")


@pytest.mark.parametrize("output", ["X/", "X/c.jsonl", "X/c.json"])
def test_nothing_of_others_is_removed_or_replaced(output: str, checkpoint: str, shards: Path, tmp_path: Path) -> None:
    mine = [".notes.2024.tmp", ".cache.v1.tmp/deep/precious", "c.jsonl", "c.json", ".c.jsonl.7.tmp", ".c.json.7.tmp"]
    for name in mine:
        path = tmp_path / "X" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    with pytest.raises(DataError, match=r"settings\.json"):
        caption(checkpoint, f"images=[{shards}/00000.tar]", f"output={tmp_path}/{output}")
    assert {str(path.relative_to(tmp_path / "X")) for path in (tmp_path / "X").rglob("*") if path.is_file()} == {*mine}
    assert all((tmp_path / "X" / name).read_text() == "mine" for name in mine)

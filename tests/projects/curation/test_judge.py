"""`coca-data score`: what it says about a pair is what model and picture alone say, and nothing is scored twice."""

import gzip
import io
import os
import shutil
import signal
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pyarrow")
from pyarrow import parquet

from coca_lit import build_transform, save_model
from coca_lit.data.bad_samples import BadSample, LostShardError
from coca_lit.data.near_duplicates import perceptual_hash
from coca_lit.data.scenes.render import render
from coca_lit.data.shards.index import TarIndex
from coca_lit.errors import DataError
from coca_lit.files import TEMPORARY, replacing
from coca_lit.models import CoCa
from coca_lit.projects.curation import judge
from coca_lit.projects.curation.judge import Judgement, judge_shard
from coca_lit.projects.curation.scores import check_current
from coca_lit.tools.prepare.annotate import AnnotatedShard
from coca_lit.tools.prepare.command import data as coca_data
from coca_lit.tools.prepare.scenes import write_shards
from helpers.shards import spoil, write_tar


@dataclass
class Work:
    model: CoCa
    checkpoint: Path
    shards: list[Path]

    def judge(self, tmp_path: Path, shard: int = 0, **more: Any) -> AnnotatedShard:
        settings = {"checkpoint": str(self.checkpoint), "output": tmp_path, "batch_size": 4} | more
        return judge_shard(self.shards[shard], Judgement(**settings))


@pytest.fixture
def work(tiny_model, tmp_path: Path) -> Work:
    model, folder = tiny_model(), tmp_path / "shards"
    folder.mkdir()
    save_model(model, tmp_path / "tiny.safetensors")
    write_shards(folder, 10, 48, per_shard=6)
    return Work(model, tmp_path / "tiny.safetensors", sorted(folder.glob("*.tar")))


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def rows(path: Path) -> list[dict[str, Any]]:
    return parquet.read_table(path).to_pylist()


def test_scores_are_those_of_each_pair_alone(work, tmp_path):
    report = work.judge(tmp_path, embeddings=True)
    assert (report.path.name, report.samples, report.bad, report.skipped) == ("00000.scores.parquet", 6, {}, False)
    content = members(work.shards[0])
    for row in rows(report.path):
        picture, caption = Image.open(io.BytesIO(content[f"{row['key']}.jpg"])), content[f"{row['key']}.txt"].decode()
        tokens = work.model.tokenizer(caption)
        with torch.no_grad():
            image = work.model.encode_image(build_transform(**work.model.preprocessing)(picture)[None])
            text = work.model.encode_text(tokens)
            logits = work.model(build_transform(**work.model.preprocessing)(picture)[None], tokens).logits
        labels = tokens[0][1 : int((tokens != 0).sum())]
        likelihood = logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean()
        assert row["shard"] == "00000.tar"
        assert row["similarity"] == pytest.approx(float(image[0] @ text[0]), abs=1e-5)
        assert row["likelihood"] == pytest.approx(float(likelihood), abs=1e-4)
        assert (row["words"], row["characters"]) == (len(caption.split()), len(caption))
        assert (row["width"], row["height"], row["aspect"]) == (48, 48, 1)
        assert row["phash"] == perceptual_hash(picture)
        assert np.allclose(row["embedding"], image[0], atol=1e-3)


def test_hash_is_that_of_the_cosine_transform_and_survives_scaling():
    photo = render(3, size=200)
    grey = np.asarray(photo.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
    low = pytest.importorskip("scipy.fft").dctn(grey)[:8, :8]
    bits = "".join("01"[int(value > np.median(low))] for value in low.ravel())
    assert f"{perceptual_hash(photo) % 2**64:064b}" == bits
    small = perceptual_hash(photo.resize((90, 90)))
    assert (perceptual_hash(photo) ^ small).bit_count() <= 4
    assert (perceptual_hash(photo) ^ perceptual_hash(render(77, size=200))).bit_count() > 8


def test_broken_samples_are_counted_and_left_out(work, tmp_path):
    files = members(work.shards[0])
    names = sorted({name.partition(".")[0] for name in files})
    files[f"{names[1]}.jpg"] = b"no image"
    del files[f"{names[2]}.txt"], files[f"{names[2]}.json"]
    write_tar(work.shards[0], files)
    report = work.judge(tmp_path)
    assert report.bad == {"unreadable image": 1, "missing caption": 1}
    assert [row["key"] for row in rows(report.path)] == [names[0], *names[3:]]
    assert work.judge(tmp_path) == report._replace(skipped=True)
    write_tar(work.shards[1], {"a.jpg": b"no image", "a.txt": b"a dog"})
    assert work.judge(tmp_path, 1).bad == {"unreadable image": 1}
    assert work.judge(tmp_path, 1).skipped


def test_the_index_of_a_checked_shard_stays(work, tmp_path):
    folder = work.shards[0].parent
    coca_data(["check", str(folder), "--workers", "1"])
    index = (folder / ".00000.tar.index").read_bytes()
    work.judge(tmp_path)
    assert (folder / ".00000.tar.index").read_bytes() == index
    write_tar(work.shards[1], {"a.jpg": b"no image", "a.txt": b"a dog"})
    with pytest.raises(DataError, match=r"00001\.tar.*sha256"):
        work.judge(tmp_path, 1)


@pytest.mark.parametrize("checked", [True, False])
def test_a_copy_without_its_time_is_known_by_its_digest_alone(work, checked):
    folder = work.shards[0].parent
    if checked:
        coca_data(["check", str(folder), "--workers", "1"])
    path = work.judge(folder).path
    os.utime(work.shards[0], (1, 1))
    if checked:
        check_current(path)
        content = work.shards[0].read_bytes()
        work.shards[0].write_bytes(content[:-1] + b"x")  # and the manifest is as before
        with pytest.raises(DataError, match=r"00000\.tar has changed since it was scored"):
            check_current(path)
        work.shards[0].write_bytes(content)
    else:
        with pytest.raises(DataError, match=r"00000\.tar has changed since it was scored"):
            check_current(path)


def test_a_shard_that_cannot_be_read_just_now_is_not_scored(work, tmp_path, monkeypatch):
    read = TarIndex.read

    def failing(index, i):
        if i == 3:
            raise LostShardError(BadSample(index.shard.name, index.key(i), "unreadable shard", "Input/output error"))
        return read(index, i)

    monkeypatch.setattr(TarIndex, "read", failing)
    with pytest.raises(DataError, match=r"00000\.tar: Input/output error: start again"):
        work.judge(tmp_path)
    assert not list(tmp_path.glob("*.parquet"))
    monkeypatch.undo()
    assert work.judge(tmp_path).samples == 6


def test_a_repeated_command_scores_what_is_new(work, tmp_path, capsys, monkeypatch):
    words = ["score", str(work.shards[0].parent), f"checkpoint={work.checkpoint}", "num_workers=0", "batch_size=4"]
    scored: list[int] = []
    naive = judge._scores
    monkeypatch.setattr(judge, "_scores", lambda *given: scored.append(len(given[2])) or naive(*given))
    coca_data(words)
    said = capsys.readouterr()
    assert "10 samples have scores, 0 bad" in said.out
    assert "scoring 2 shards: 2 done, 0 skipped (finished before), 0 failed" in said.err
    content = [path.read_bytes() for path in sorted(work.shards[0].parent.glob("*.parquet"))]
    scores = work.shards[0].with_name("00001.scores.parquet")
    scores.unlink()
    if (process := os.fork()) == 0:
        with replacing(scores):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    coca_data(words)
    assert "scoring 2 shards: 1 done, 1 skipped (finished before), 0 failed" in capsys.readouterr().err
    assert not [*scores.parent.glob(f"*{TEMPORARY}")]
    assert content == [path.read_bytes() for path in sorted(work.shards[0].parent.glob("*.parquet"))]
    spoil(work.shards[0], {"000000.json": b"{}"})
    coca_data(words)
    assert scored == [4, 2, 4, 4, 4, 2]


def test_shards_that_cannot_be_scored_together(work, tmp_path):
    other = tmp_path / "other" / work.shards[0].name
    other.parent.mkdir()
    other.write_bytes(work.shards[1].read_bytes())
    folders = [str(work.shards[0].parent), str(other.parent)]
    with pytest.raises(SystemExit, match=r"shards/00000\.tar.*other/00000\.tar"):
        coca_data(["score", *folders, f"checkpoint={work.checkpoint}", f"output={tmp_path / 'out'}"])
    coca_data(["score", *folders, f"checkpoint={work.checkpoint}", "num_workers=0"])  # beside the shards
    assert [len(rows(path)) for path in sorted(tmp_path.glob("*/*.scores.parquet"))] == [4, 6, 4]
    packed = tmp_path / "00000.tar.gz"
    packed.write_bytes(gzip.compress(work.shards[0].read_bytes()))
    with pytest.raises(SystemExit, match=r"00000\.tar\.gz"):
        coca_data(["score", str(packed), f"checkpoint={work.checkpoint}"])


def test_scores_of_another_model_are_refused(work, tmp_path):
    work.judge(tmp_path)
    with pytest.raises(DataError, match=r"embeddings=False.*embeddings=True"):
        work.judge(tmp_path, embeddings=True)
    other = tmp_path / "other.safetensors"
    save_model(CoCa(work.model.config), other)
    with pytest.raises(DataError, match="model="):
        work.judge(tmp_path, checkpoint=str(other))
    (tmp_path / "scores.settings.json").unlink()
    with pytest.raises(DataError, match=r"00000\.scores\.parquet"):
        work.judge(tmp_path, checkpoint=str(other))


def test_scores_of_another_shard_of_the_same_name_stay(work, tmp_path):
    """As img2dataset names all of them; the scores of one that has moved are made again."""
    work.judge(tmp_path / "scores")
    first, other = work.shards[0], tmp_path / "second" / work.shards[0].name
    other.parent.mkdir()
    other.write_bytes(first.read_bytes())
    asked = Judgement(checkpoint=str(work.checkpoint), output=tmp_path / "scores", batch_size=4)
    with pytest.raises(DataError, match=r"was made of .*00000\.tar: choose another output"):
        judge_shard(other, asked)
    first.unlink()
    assert not judge_shard(other, asked).skipped
    judge_shard(other, asked._replace(output=None))
    shutil.copytree(other.parent, tmp_path / "copy", copy_function=shutil.copyfile)
    assert not judge_shard(tmp_path / "copy" / other.name, asked._replace(output=None)).skipped


def test_of_two_commands_that_begin_at_once_one_writes(work, tmp_path, monkeypatch):
    """The second one, with other settings, begins while the first one has no result yet."""
    words = ["score", str(work.shards[0].parent), f"checkpoint={work.checkpoint}", "num_workers=0"]
    naive, second = judge.write_scores, []

    def during(*given: Any) -> None:
        if not second:
            second.append(None)
            with pytest.raises(SystemExit, match=r"embeddings=False.*embeddings=True"):
                coca_data([*words, "--embeddings"])
        naive(*given)

    monkeypatch.setattr(judge, "write_scores", during)
    coca_data(words)
    assert second
    assert "embedding" not in rows(work.shards[0].with_name("00000.scores.parquet"))[0]


def test_pixels_are_those_of_a_training(work, tmp_path):
    """Which turns images upright."""
    turned = Image.Exif()
    turned[0x0112] = 6
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((32, 48)).save(buffer, "JPEG", exif=turned)
    tall = io.BytesIO()
    Image.linear_gradient("L").resize((32, 48)).save(tall, "JPEG")
    caption = next(content for name, content in members(work.shards[0]).items() if name.endswith(".txt"))
    content = {"a.jpg": buffer.getvalue(), "a.txt": caption, "b.jpg": tall.getvalue(), "b.txt": caption}
    write_tar(work.shards[0], content)
    found = [(row["width"], row["height"], row["aspect"]) for row in rows(work.judge(tmp_path).path)]
    assert found == [(48, 32, 1.5), (32, 48, 1.5)]


def test_language_of_captions_that_a_clip_judges(work, tiny_model, tmp_path):
    pytest.importorskip("py3langid")
    save_model(tiny_model(decoder_layers=0), work.checkpoint)
    write_tar(work.shards[0], {"a.jpg": members(work.shards[0])["000000.jpg"], "a.txt": b"ein Hund am Strand"})
    (row,) = rows(work.judge(tmp_path, language=True).path)
    assert row["language"] == "de"
    assert "likelihood" not in row

"""Reinforced shards: training sees the crops that the teachers saw, bit for bit, with what they said of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coca_lit import save_model
from coca_lit.data.pixels import decode_pixels
from coca_lit.data.shards.laion import LAIONDataModule
from coca_lit.data.sources import as_tensor
from coca_lit.data.transforms import resized
from coca_lit.errors import DataError
from coca_lit.projects.distillation import teach
from coca_lit.projects.distillation.reinforced import Reinforced, teachers_of
from coca_lit.projects.distillation.teach import Teaching, claim_outputs, teach_shard
from coca_lit.tools.prepare.command import data as coca_data
from coca_lit.tools.prepare.scenes import write_shards
from helpers.running import run
from helpers.shards import TOKENIZER, jpeg, write_tar

SIZE = 32  # of the crops, and of the tiny model
CAPTIONS = {"txt": "a dog", "original_caption": "a number", "generated_captions": ["a dog", "a dog number", "dog"]}


@pytest.fixture
def teachers(tiny_model, tmp_path: Path) -> tuple[str, ...]:
    paths = []
    for seed, more in enumerate(({}, {"embed_dim": 24, "decoder_layers": 0})):
        torch.manual_seed(seed)
        paths.append(str(tmp_path / f"teacher{seed}.safetensors"))
        save_model(tiny_model(**more), paths[-1])
    return tuple(paths)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shards(folder, 6, 48, per_shard=6)
    return folder / "00000.tar"


def laion(shard: Path, **more: Any) -> LAIONDataModule:
    given = {"teachers": str(shard.parent), "tokenizer": TOKENIZER, "batch_size": 2, "image_size": SIZE, **more}
    return LAIONDataModule(given.pop("shards", str(shard)), None, cache_dir=str(shard.parent / "cache"), **given)


def test_the_crop_replayed_is_the_crop_that_the_teachers_saw(shard, teachers, monkeypatch) -> None:
    seen: list[Tensor] = []
    embed = teach._embed
    monkeypatch.setattr(teach, "_embed", lambda model, x: (seen.append(x), embed(model, x))[1])
    report = teach_shard(shard, Teaching(teachers, views=3, batch_size=4))
    assert (report.samples, report.bad, report.skipped) == (6, {}, False)
    crops = torch.cat([x for x in seen[::4] if isinstance(x, Tensor)])  # those of the first teacher
    assert len(crops) == 6 * 3
    views = set()
    for seed in range(5):
        for batch in laion(shard, seed=seed).train_dataloader():
            for i, pixels in enumerate(batch.images):
                (place,) = [n for n, crop in enumerate(crops) if torch.equal(crop, pixels)]
                views.add(place)
                for (images, texts, scale), path in zip(teachers_of(batch), teachers, strict=True):
                    model = teach.load_annotator(path, False)[0]
                    with torch.no_grad():
                        expected = model.encode_image(pixels[None])[0], model.logit_scale.exp()
                    torch.testing.assert_close(images[i].float(), expected[0], atol=2e-3, rtol=0)
                    assert scale == pytest.approx(expected[1].item())
                    assert texts[i].float().norm().item() == pytest.approx(1, abs=1e-2)
    assert len(views) > 6  # other views of an image in other passes


def test_every_caption_has_its_own_embedding_and_what_is_broken_is_left_out(tmp_path: Path, teachers) -> None:
    fields = json.dumps({k: v for k, v in CAPTIONS.items() if k != "txt"}).encode()
    files = {
        "a.jpg": jpeg(1),
        "a.txt": CAPTIONS["txt"].encode(),
        "a.json": fields,
        "b.jpg": b"no image",
        "b.txt": b"dog",
    }
    shard = write_tar(tmp_path / "00000.tar", files | {"c.jpg": jpeg(2), "c.txt": b"a dog"})
    keys = ("txt", "original_caption", "generated_captions")
    assert teach_shard(shard, Teaching(teachers, caption_keys=keys)).bad == {"unreadable image": 1}
    file = Reinforced(tmp_path / "00000.teachers.safetensors")
    for number, path in enumerate(teachers):
        model = teach.load_annotator(path, False)[0]
        for caption in ("a dog", "a number", "a dog number", "dog"):
            with torch.no_grad():
                expected = model.encode_text(model.tokenizer.tokens_of([caption]))[0]
            found = file.teachers(file.row("a"), 0, caption)[number].texts
            torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=0)
    with pytest.raises(DataError, match=r"'a cat'.*--caption-keys"):
        file.teachers(file.row("c"), 0, "a cat")
    with pytest.raises(DataError, match="lacks the sample b"):
        file.row("b")
    batches = laion(shard, caption_keys={"generated_captions": 1, "txt": 1}, max_bad_fraction=0.9).train_dataloader()
    assert all(len(teachers_of(batch)) == 2 for batch in batches)


def test_a_selection_reads_its_rows(shard, teachers, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    teach_shard(shard, Teaching(teachers))
    whole = {key: laion(shard).training_examples().indexes[0].key(i) for i, key in enumerate("abcdef")}
    kept = [whole["e"], whole["b"]]
    parquet.write_table(pa.table({"shard": ["00000.tar"] * 2, "key": kept}), tmp_path / "kept.parquet")
    (batch,) = laion(shard, selection=str(tmp_path / "kept.parquet")).train_dataloader()
    pixels = {key.rpartition("/")[2]: image for key, image in zip(batch.keys, batch.images, strict=True)}
    file, examples = Reinforced(shard.parent / "00000.teachers.safetensors"), laion(shard).training_examples()
    for i in range(6):
        if (key := examples.indexes[0].key(i)) in pixels:
            image = as_tensor(decode_pixels(examples.indexes[0].read(i)["jpg"], key))
            crops = [resized(image, file.box(file.row(key), view), (SIZE, SIZE)) for view in range(4)]
            assert any(torch.equal(crop, pixels[key]) for crop in crops)


def test_finished_shards_are_skipped_and_changed_ones_done_again(shard, teachers) -> None:
    teaching = Teaching(teachers)
    first = teach_shard(shard, teaching)
    assert teach_shard(shard, teaching) == first._replace(skipped=True)
    claim_outputs([shard], teaching)
    with pytest.raises(DataError, match="views=4, but now views=2"):
        claim_outputs([shard], Teaching(teachers, views=2))
    write_tar(shard, {"a.jpg": jpeg(1), "a.txt": b"a dog", "b.jpg": jpeg(2), "b.txt": b"dog"})
    with pytest.raises(DataError, match="has changed since"):
        laion(shard).train_dataloader()
    assert not teach_shard(shard, teaching).skipped
    size = shard.stat().st_size
    write_tar(shard, {"a.jpg": jpeg(3), "a.txt": b"a cat", "b.jpg": jpeg(2), "b.txt": b"dog"})
    assert shard.stat().st_size == size  # tars are padded
    assert not teach_shard(shard, teaching).skipped


def test_what_teachers_do_not_fit_is_refused(shard, teachers) -> None:
    with pytest.raises(DataError, match=r"00000.teachers.safetensors holds no embeddings.*coca-data teach"):
        laion(shard).train_dataloader()
    (shard.parent / "00000.teachers.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="holds no embeddings"):
        Reinforced(shard.parent / "00000.teachers.safetensors")
    (shard.parent / "00000.teachers.safetensors").unlink()
    teach_shard(shard, Teaching(teachers))
    other = shard.parent / "other" / shard.name
    other.parent.mkdir()
    other.write_bytes(shard.read_bytes())
    mixture = {"a": str(shard), "b": str(other)}
    with pytest.raises(DataError, match=rf"data.teachers has one file for {shard} and {other}, .*same file name"):
        laion(shard, shards=mixture).train_dataloader()


def test_embeddings_of_other_teachers_are_not_mixed(shard, teachers, tiny_model, tmp_path: Path) -> None:
    """Weights of the same name that change while the command runs, and files from two folders."""
    others = [shard.with_name(f"0000{i}.tar") for i in (1, 2)]
    for other in others:
        other.write_bytes(shard.read_bytes())
    teach_shard(shard, Teaching(teachers))
    model = tiny_model()
    model.logit_scale.data += 1
    save_model(model, teachers[0])
    teach.load_annotator.cache_clear()  # as in another process
    with pytest.raises(DataError, match=r"teachers\.settings\.json says teachers="):
        teach_shard(others[0], Teaching(teachers))
    for other in others:
        teach_shard(other, Teaching(teachers, tmp_path / "other"))
        made = tmp_path / "other" / f"{other.stem}.teachers.safetensors"
        made.rename(shard.with_name(made.name))
    laion(shard, shards=[str(other) for other in others]).train_dataloader()
    with pytest.raises(DataError, match=r"00000\.teachers.* and .*00001\.teachers.* are of other teachers: remove"):
        laion(shard, shards=str(shard.parent)).train_dataloader()


@pytest.mark.slow
def test_from_the_command_to_the_training(shard, teachers, tmp_path: Path, capsys) -> None:
    words = ["--num-workers", "0", "--views", "2", "--precision", "fp32"]
    coca_data(["teach", str(shard.parent), "--teachers", *teachers, *words])
    assert "6 samples have embeddings" in capsys.readouterr().out
    run(
        tmp_path / "run",
        *("data=laion", f"data.shards={shard.parent}", f"data.teachers={shard.parent}", "data.epoch_samples=null"),
        *("data.batch_size=2", "data.num_workers=0", "trainer=cpu", "trainer.max_epochs=1", "evals=[]"),
        *("image_size=32", "model.warmup_steps=1", "ema=null"),
        "+model.objectives.teach._target_=coca_lit.projects.distillation.objective.Distillation",
    )
    assert "train/distillation_loss" in capsys.readouterr().out

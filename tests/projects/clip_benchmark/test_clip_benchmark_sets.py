"""Data sets in CLIP_benchmark's layout: our scores of a checkpoint equal CLIP_benchmark's own command line's."""

import functools
import json
import random
import shutil
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from huggingface_hub import constants
from open_clip.tokenizer import _tokenizer
from PIL import Image

from coca_lit.data.scenes.render import Scene, captions, decode, render
from coca_lit.data.transforms import build_transform
from coca_lit.errors import DataError, DataNotFoundError
from coca_lit.evals import Settings
from coca_lit.models import CoCa, create_model
from coca_lit.projects.clip_benchmark import command
from coca_lit.projects.clip_benchmark.sets import captioned_shards, classified_shards, clip_benchmark
from coca_lit.weights.load import save_model
from helpers.hub_server import Hub, Repository, answers_at

pytest.importorskip("clip_benchmark")

FLOWERS = [
    *("rose", "tulip", "lily", "daisy", "orchid", "iris", "poppy", "peony", "dahlia", "lotus", "aster", "sun flower")
]
SETS = {  # name -> (classes, format of the images, images in a shard)
    "flowers": (FLOWERS, "webp", 7),
    "vtab/pets": (["cat", "dog", "{brown} horse"], "jpg", 100),
}
TEMPLATES = ["a photo of a {c}.", "the {c} in a {c} picture"]
COUNT = 30


def encoded(number: int, kind: str) -> bytes:
    buffer = BytesIO()
    image = render(number, 40).resize((40 + number % 9, 44))
    image.save(buffer, {"jpg": "jpeg"}.get(kind, kind), **({"lossless": True} if kind == "webp" else {}))
    return buffer.getvalue()


@functools.cache
@torch.no_grad()
def model() -> CoCa:
    """Random weights find all images alike, and all texts: without what they share, no two are nearly tied."""
    torch.manual_seed(0)
    net = create_model("coca_tiny", text_layers=1, decoder_layers=1, tokenizer="clip").eval()
    images = torch.stack([build_transform(size=32)(render(number, 40)) for number in range(COUNT)])
    tokens = net.tokenizer([text for number in range(COUNT) for text in captions(decode(number))])
    for weight, encoded in (
        (net.image_projection.weight, net.encode_image(images, normalize=False)),
        (net.text.projection.weight, net.encode_text(tokens, normalize=False)),
    ):
        shared = torch.nn.functional.normalize(encoded.mean(dim=0), dim=0)  # (E,)
        weight -= shared[:, None] * (shared @ weight)
    return net


@torch.no_grad()
def nearest(net: CoCa, content: bytes, classes: list[str]) -> int:
    """What the model answers: the class whose prompts are nearest on average."""
    image = build_transform(size=net.image_size)(Image.open(BytesIO(content)))[None]
    texts = [
        net.encode_text(net.tokenizer([text.format(c=name) for text in TEMPLATES])).mean(dim=0) for name in classes
    ]
    return int((torch.nn.functional.normalize(torch.stack(texts), dim=-1) @ net.encode_image(image)[0]).argmax())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of classes, where the model is right about half of the time, one of captions, and a checkpoint."""
    root, rng, net = tmp_path_factory.mktemp("benchmark"), random.Random(0), model()
    save_model(net, root / "model.safetensors")
    for name, (classes, kind, per_shard) in SETS.items():
        samples = []
        for i in range(COUNT):
            content = encoded(i, kind)
            label = nearest(net, content, classes) if rng.random() < 0.5 else rng.randrange(len(classes))
            samples.append({"__key__": f"s{i:07d}", kind: content, "cls": label})
        write(root / name, samples, per_shard)
        (root / name / "classnames.txt").write_text("\n".join(classes) + "\n")
        (root / name / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    scenes = [{"__key__": f"s{i:07d}", "png": encoded(i, "png"), "txt": "\n".join(texts(i))} for i in range(COUNT)]
    write(root / "captions", scenes, 20)
    (root / "captions" / "dataset_type.txt").write_text("retrieval\n")
    return root


def texts(number: int) -> tuple[str, ...]:
    scene: Scene = decode(number)
    return tuple(captions(scene))[: 1 + number % 3]


def write(folder: Path, samples: list[dict[str, object]], per_shard: int) -> None:
    (folder / "test").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:  # this package allows webdataset no files of its own
        patch.setattr(webdataset.utils, "enforce_security", False)
        sink = webdataset.ShardWriter(str(folder / "test" / "%d.tar"), maxcount=per_shard, verbose=0)
        for sample in samples:
            sink.write(sample)
        sink.close()
    (folder / "test" / "nshards.txt").write_text(f"{-(-len(samples) // per_shard)}\n")


def theirs(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, float]:
    """What `python -m coca_lit.projects.clip_benchmark eval` writes."""
    choice = ["--model_type", "coca_lit", "--model", "mine", "--pretrained", str(root / "model.safetensors")]
    rest = ["--num_workers", "0", "--batch_size", "8", "--quiet", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "eval", *choice, *rest, *words])
    command.clip_benchmark()
    return json.loads(output.read_text())["metrics"]


def test_zero_shot_scores(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, float] = {}
    for evaluation in clip_benchmark(root, list(SETS)):
        found |= evaluation.evaluate(model(), Settings(tmp_path, batch_size=8))
    for name in SETS:
        place = ["--dataset", f"wds/{name}", "--dataset_root", f"{root}/{name}"]
        task = ["--task", "zeroshot_classification"]
        metrics = theirs(root, tmp_path / "theirs.json", monkeypatch, *place, *task)
        ours = name.replace("/", "-")
        assert 0.3 < metrics["acc1"] < 0.9
        assert found[f"{ours}/top1"] == pytest.approx(metrics["acc1"], abs=1e-6)
        assert found[f"{ours}/mean_per_class_recall"] == pytest.approx(metrics["mean_per_class_recall"], abs=1e-6)
        if len(SETS[name][0]) >= 5:
            assert found[f"{ours}/top5"] == pytest.approx(metrics["acc5"], abs=1e-6)


@pytest.mark.parametrize(
    ("words", "more"), [(["eval"], ["--no_amp"]), (["eval", "--no_amp"], []), (["build", "x.json"], [])]
)
def test_half_precision_is_off(words: list[str], more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *words])
    monkeypatch.setattr("clip_benchmark.cli.main", lambda: None)
    command.clip_benchmark()
    assert sorted(sys.argv[1:]) == sorted([*words, *more])


def test_a_missing_checkpoint_is_one_sentence(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ["--dataset", "wds/flowers", "--dataset_root", f"{root}/flowers", "--pretrained", f"{tmp_path}/gone.ckpt"]
    with pytest.raises(SystemExit, match=r"^error: .*gone\.ckpt"):
        theirs(root, tmp_path / "theirs.json", monkeypatch, *place, "--task", "zeroshot_classification")


def test_retrieval_scores(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (evaluation,) = clip_benchmark(root, ["captions"])
    found = evaluation.evaluate(model(), Settings(tmp_path))
    place = ["--dataset", "wds/captions", "--dataset_root", f"{root}/captions", "--recall_k", "1", "5"]
    metrics = theirs(root, tmp_path / "theirs.json", monkeypatch, *place, "--task", "zeroshot_retrieval")
    for k in (1, 5):
        assert found[f"captions/t2i_recall@{k}"] == pytest.approx(metrics[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert found[f"captions/i2t_recall@{k}"] == pytest.approx(metrics[f"text_retrieval_recall@{k}"], abs=1e-6)


def test_all_data_sets_of_a_folder(root: Path) -> None:
    assert [evaluation.name for evaluation in clip_benchmark(root)] == ["captions", "flowers", "vtab-pets"]
    records = captioned_shards(root / "captions")
    assert [record.captions for record in records] == [texts(number) for number in range(COUNT)]
    with pytest.raises(DataError, match="retrieval"):
        captioned_shards(root / "flowers")
    images = classified_shards(root / "flowers")
    assert len(images.records) == COUNT == len(images.labels)
    assert [record.id for record in images.records[:2]] != ["0/s0000000", "0/s0000001"]  # a fair sample comes first


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_data_sets_on_the_hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched once, and read from the cache where the Hub cannot be reached."""
    with Hub() as hub:
        hub.repositories["org/wds_flowers"] = Repository(files_of(root / "flowers") | {"train/0.tar": b"another split"})
        hub.repositories["org/wds_vtab-pets"] = Repository(files_of(root / "vtab/pets"))
        answers_at(monkeypatch, hub.url, tmp_path / "cache")
        found = clip_benchmark("hf://datasets/org", list(SETS))
        with pytest.raises(DataNotFoundError, match="org/wds_cars"):
            clip_benchmark("hf://datasets/org", ["cars"])
    here = clip_benchmark(root, list(SETS))
    for evaluation, expected in zip(found, here, strict=True):
        assert (evaluation.name, evaluation.prompts) == (expected.name, expected.prompts)
        assert evaluation.labels == expected.labels
        assert [r.image().tobytes() for r in evaluation.records] == [r.image().tobytes() for r in expected.records]
    assert not list((tmp_path / "cache").rglob("train"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = clip_benchmark("hf://datasets/org", list(SETS))
    assert [evaluation.labels for evaluation in again] == [evaluation.labels for evaluation in here]


def test_captions_of_another_vocabulary(tiny_model: Any, tmp_path: Path) -> None:
    """CLIP_benchmark decodes captions as CLIP's byte pairs, whatever wrote them."""
    net = tiny_model()
    save_model(net, tmp_path / "words.safetensors")
    loaded, transform, _ = command.load_model("words", str(tmp_path / "words.safetensors"))
    images = torch.stack([transform(render(number, 40)) for number in range(3)])
    ids = loaded.generate(images)
    assert ids.shape == (3, 77)
    found = [_tokenizer.decode(row).split("<end_of_text>")[0] for row in ids.numpy()]
    written = [text.replace("<start_of_text>", "").strip() for text in found]
    assert written == [net.tokenizer.decode(ids) for ids in net.generate(images)]
    assert any(written)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / "test" / "1.tar").unlink(), DataNotFoundError, r"5 .*1\.tar"),
        (lambda folder: (folder / "test" / "nshards.txt").write_text("0\n"), DataError, "nshards.txt"),
    ],
)
def test_damaged_data_sets(root: Path, tmp_path: Path, damage: Any, error: type[Exception], message: str) -> None:
    shutil.copytree(root / "flowers", tmp_path / "flowers")
    damage(tmp_path / "flowers")
    with pytest.raises(error, match=message):
        clip_benchmark(tmp_path)


def test_images_without_a_caption_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    samples = [{"__key__": f"s{i}", "png": encoded(i, "png"), "txt": text} for i, text in enumerate(["", "a\nb"])]
    write(tmp_path, samples, 2)
    assert [(record.id, record.captions) for record in captioned_shards(tmp_path)] == [("0/s1", ("a", "b"))]
    assert "skipped 1 of 2 images without a caption" in caplog.text
    shutil.rmtree(tmp_path / "test")
    write(tmp_path, samples[:1], 2)
    with pytest.raises(DataError, match=r"test\b.*1"):
        captioned_shards(tmp_path)


def test_there_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match="CLIP_benchmark"):
        clip_benchmark(tmp_path)
    with pytest.raises(DataError, match=r"example\.com"):
        clip_benchmark("https://example.com/datasets", ["imagenet1k"])

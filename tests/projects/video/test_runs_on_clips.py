"""Training and evaluation on clips: of built-in scenes, and of files in their original layouts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

pytest.importorskip("av")

from coca_lit import load_model
from coca_lit.cli import evaluate
from coca_lit.cli.assembly import plain
from coca_lit.cli.command import compose
from coca_lit.errors import DataError
from coca_lit.projects.video.scenes import motion_records
from coca_lit.runs.results import read_conditions
from helpers.clips import write_clip
from helpers.running import TINY, results, run, without_java
from helpers.shards import write_tar

pytestmark = pytest.mark.slow
SMALL = ("data.records.frames=3", "data.batch_size=4", "data.num_workers=0")
MOTION = ("experiment=scenes_motion", "data.train_count=64", "data.frames=2", "evals=[scenes_motion_choice]")


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    without_java(monkeypatch)


def test_built_in_clips(tmp_path: Path) -> None:
    run(tmp_path, *TINY, *MOTION[:3], "+model.net.frame_positions=2")
    kinds = {f"scenes_motion_choice/{kind}_accuracy" for kind in ("object", "time", "mover")}
    assert {"scenes_motion/CIDEr", "scenes_motion/t2i_recall@10", *kinds} <= set(results(tmp_path))
    assert (tmp_path / "samples" / "scenes_motion_retrieval.png").is_file()
    model = load_model(tmp_path)
    assert model.pooling.frame_positions.abs().sum() > 0  # trained


def test_cached_features(tmp_path: Path) -> None:
    frozen = ("model.freeze=[image_encoder]", "data.cached_augmentations=1", f"data.cache_dir={tmp_path}/cache")
    run(tmp_path / "run", *TINY, *MOTION, *frozen)
    shapes = {np.load(path, mmap_mode="r").shape for path in (tmp_path / "cache").rglob("*.npy")}
    assert {shape[1:] for shape in shapes} == {(2 * 16, 128)}
    with pytest.raises(DataError, match="cached for frame_pooling=tokens"):
        run(tmp_path / "mean", *TINY, *MOTION, *frozen, "+model.net.frame_pooling=mean")


def write_msrvtt(root: Path) -> None:
    """Clips of moving scenes as MSR-VTT's."""
    records = motion_records("test", frames=6, size=32, count=12)
    (root / "videos").mkdir(parents=True)
    splits = ["train"] * 6 + ["validate"] * 2 + ["test"] * 4
    for i, record in enumerate(records):
        write_clip(root / "videos" / f"video{i}.mp4", [np.asarray(frame) for frame in record.image.frames()])
    videos = [{"video_id": f"video{i}", "split": split} for i, split in enumerate(splits)]
    sentences = [{"video_id": f"video{i}", "caption": record.captions[0]} for i, record in enumerate(records)]
    (root / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    rows = [f"r{i},m{i},video{i},{records[i].captions[0]}" for i in (8, 9, 10)]
    (root / "MSRVTT_JSFUSION_test.csv").write_text("\n".join(["key,vid_key,video_id,sentence", *rows]))


def test_files_of_msrvtt(tmp_path: Path) -> None:
    write_msrvtt(tmp_path / "msrvtt")
    data = ("data=msrvtt", f"data.root={tmp_path}/msrvtt", *SMALL)
    run(tmp_path / "run", *TINY, *data, "evals=msrvtt", "+model.net.tokenizer=scenes_motion")
    scores: dict[str, dict[str, float]] = {}
    for way in ("tokens", "mean"):
        words = [
            *(f"checkpoint={tmp_path}/run", "evals=msrvtt", f"roots.msrvtt={tmp_path}/msrvtt", f"frame_pooling={way}"),
            f"output_dir={tmp_path}/{way}",
        ]
        scores[way] = evaluate.run(compose("evaluate", words))
        conditions = read_conditions(tmp_path / way)
        assert conditions["msrvtt/t2i_recall@1"].images == 3  # of the split 1k-A
        assert conditions["msrvtt/CIDEr"].images == 4
        assert conditions["msrvtt/t2i_recall@1"].settings == {"frames": "16", "frame_pooling": way}
    assert scores["tokens"].keys() == scores["mean"].keys()


def test_clips_in_shards(tmp_path: Path) -> None:
    files = {}
    for record in motion_records("test", frames=6, size=32, count=8):
        clip = write_clip(tmp_path / "clip.mp4", [np.asarray(frame) for frame in record.image.frames()])
        files |= {f"{record.id}.mp4": clip.read_bytes(), f"{record.id}.txt": record.captions[0].encode()}
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "00000.tar", files)
    data = ("data=laion", f"data.shards={tmp_path}/shards", "data.frames=3", "data.epoch_samples=8")
    sizes = ("data.batch_size=4", "data.num_workers=0", "+model.net.tokenizer=scenes_motion")
    scored = ("evals=[clip_shards_captions,clip_shards_retrieval]", f"roots.clip_shards={tmp_path}/shards")
    run(tmp_path / "run", *TINY, *data, *sizes, *scored)
    assert {"clip_shards/CIDEr", "clip_shards/t2i_recall@1"} <= set(results(tmp_path / "run"))
    assert read_conditions(tmp_path / "run")["clip_shards/CIDEr"].settings["frames"] == "3"


def test_classes_of_clips(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number, record in enumerate(motion_records("test", frames=4, size=32, count=8)):
            folder = tmp_path / "kinetics" / split / record.image.motion.event
            folder.mkdir(parents=True, exist_ok=True)
            write_clip(folder / f"{number}.mp4", [np.asarray(frame) for frame in record.image.frames()])
    data = ("data=kinetics", f"data.root={tmp_path}/kinetics", *SMALL)
    run(tmp_path / "run", *TINY, "experiment=finetune_classes", *data, "evals=kinetics", "init_from=null", "ema=null")
    assert "kinetics/accuracy" in results(tmp_path / "run")
    words = [
        *(f"checkpoint={tmp_path}/run", "evals=kinetics_zeroshot", f"roots.kinetics={tmp_path}/kinetics"),
        *("scoring.split=val", f"output_dir={tmp_path}/scored"),
    ]
    assert {"kinetics_zeroshot/top1", "kinetics_zeroshot/mean_per_class_recall"} <= evaluate.run(
        compose("evaluate", words)
    ).keys()


@pytest.mark.parametrize(
    ("data", "changed", "expected"),
    [
        ("msrvtt", ("records.frames=5", "records.one_thousand=true"), {"frames": 5, "one_thousand": True}),
        ("my_clips", (), {"frames": 8}),
        ("kinetics", ("records.frames=3",), {"frames": 3}),
        ("scenes_motion", ("frames=6",), {"frames": 6}),
        ("kinetics", ("records.classes={}/split.json",), {"classes": "{}/split.json"}),
    ],
)
def test_the_evaluations_read_as_those_of_the_run(
    tmp_path: Path, data: str, changed: tuple[str, ...], expected: dict[str, Any]
) -> None:
    """Of a run as it is written, the frames of clips and the split among them."""
    (tmp_path / "split.json").touch()
    overrides = (f"++data.{word.format(tmp_path)}" for word in changed)
    config = compose("train", [f"data={data}", *overrides])
    OmegaConf.save(OmegaConf.create(plain(config)), tmp_path / "config.yaml")
    evals = compose("evaluate", evaluate.with_evals([f"checkpoint={tmp_path}"])).evals
    expected = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in expected.items()}
    assert evals
    for node in evals.values():
        assert {key: node.records[key] for key in expected} == expected

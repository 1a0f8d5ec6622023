"""When evaluations run, on which weights, under which names, and which checkpoint is kept as the best."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from coca_lit.callbacks import ScoreDuringTraining, checkpoint
from coca_lit.cli.assembly import build, build_trainer
from coca_lit.cli.module import build_module
from coca_lit.data.records import Record
from coca_lit.data.scenes.render import scene_records
from coca_lit.errors import ConfigError
from coca_lit.evals import Evaluation, Settings
from coca_lit.evals.captions import CaptionScores
from coca_lit.evals.retrieval import RetrievalScores
from coca_lit.metrics.java.spice import CATEGORIES
from coca_lit.models import CoCa, create_model
from helpers.running import compose, without_java
from helpers.slow import slow

# Two epochs of four steps.
SHORT = (
    *("trainer=cpu", "trainer.max_epochs=2", "trainer.limit_val_batches=0", "trainer.log_every_n_steps=1"),
    *("data.train_count=32", "data.batch_size=8", "model.warmup_steps=2", "evals=[]", "name=test"),
    *("+model.net.text_layers=1", "+model.net.decoder_layers=1", "model.net.dropout=0.1"),
)
RECORDS = scene_records("val", count=12)


class Probe(Evaluation):
    """A user's score: the value that `value` returns for each call. Remembers when it was asked, and for what."""

    def __init__(self, value: Callable[[CoCa], float], name: str = "probe", measure: str = "value", every: int = 1):
        super().__init__(name, RECORDS, every)
        self.value, self.measure = value, measure
        self.counts: list[int] = []
        self.values: list[float] = []

    def scores(self, model: Any, records: Sequence[Record], settings: Settings) -> dict[str, float]:
        torch.rand(3)  # what an evaluation draws does not change the training
        self.counts.append(len(records))
        self.values.append(self.value(model))
        return {self.measure: self.values[-1]}


def scale(model: CoCa) -> float:
    return model.logit_scale.item()


def train(
    folder: Path, *overrides: str, evals: Sequence[Evaluation] = (), watch: L.Callback | None = None, **when: Any
) -> L.Trainer:
    cfg = compose(*SHORT, f"output_dir={folder}", *overrides)
    L.seed_everything(0, workers=True, verbose=False)
    module = build_module(cfg)
    data = build(cfg.data, "data", tokenizer=module.net.tokenizer)
    trainer = build_trainer(cfg, ScoreDuringTraining(evals, Settings(folder), **when))
    trainer.callbacks += [watch] if watch else []
    trainer.fit(module, datamodule=data, ckpt_path=None if cfg.ckpt_path == "auto" else cfg.ckpt_path)
    return trainer


def logged(folder: Path, part: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of the columns of metrics.csv whose names contain `part`."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in rows[0] if part in name
    }


# When


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        ({}, {0: [], 1: [3]}),
        ({"every_n_epochs": None, "every_n_steps": 2}, {2: [3]}),
        *slow(({"every_n_steps": 3}, {1: [2, 3, 5]}), ({"every_n_epochs": None}, {1: []})),
    ],
)
def test_scores_come_every_n_epochs_or_steps_and_at_the_end(
    tmp_path: Path, when: dict[str, Any], steps: dict[int, list[int]]
) -> None:
    """`steps` of an evaluation by its `every`."""
    probes = {every: Probe(scale, f"probe{every}", every=every) for every in steps}
    trainer = train(tmp_path, evals=[*probes.values()], quick=5, **when)
    columns = logged(tmp_path, "probe")
    for every, probe in probes.items():
        during = columns.get(f"probe{every}_5/value", [])
        assert probe.counts == [*[5] * len(steps[every]), 12]
        assert [step for step, _ in during] == steps[every]
        assert [value for _, value in during] == pytest.approx(probe.values[:-1])
        assert columns[f"probe{every}/value"] == [(8, pytest.approx(probe.values[-1]))]
    found = next(c for c in trainer.callbacks if isinstance(c, ScoreDuringTraining)).found.scores
    assert found == {f"probe{every}/value": probe.values[-1] for every, probe in probes.items()}


@pytest.mark.slow
def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    probe = Probe(scale)
    accumulated = ("trainer.accumulate_grad_batches=2", "model.caption_weight=0")
    train(tmp_path, *accumulated, evals=[probe], quick=5, every_n_epochs=None, every_n_steps=1)
    assert probe.counts == [5, 5, 5, 12]


@pytest.mark.slow
def test_end_of_training_is_scored_once(tmp_path: Path) -> None:
    probe = Probe(scale)
    train(tmp_path, "trainer.max_steps=4", evals=[probe], every_n_steps=4)
    assert probe.counts == [12]


def test_scoring_does_not_change_the_training(tmp_path: Path) -> None:
    without = train(tmp_path / "without", "callbacks.step_seeds=null").lightning_module
    evals = [RetrievalScores("scenes", RECORDS), Probe(scale)]
    scored = train(tmp_path / "with", "callbacks.step_seeds=null", evals=evals, every_n_steps=1).lightning_module
    torch.testing.assert_close(scored.state_dict(), without.state_dict(), rtol=0, atol=0)
    assert logged(tmp_path / "with", "_loss") == logged(tmp_path / "without", "_loss")


class Scales(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.values.append(scale(pl_module.net))


@pytest.mark.slow
def test_averaged_weights_are_scored(tmp_path: Path) -> None:
    probe, scales = Probe(scale), Scales()
    train(tmp_path, "ema=0.75", evals=[probe], watch=scales, every_n_epochs=None, every_n_steps=2)
    averages = [scales.values[0]]
    for now in scales.values[1:]:
        averages.append(0.75 * averages[-1] + 0.25 * now)
    assert probe.values == pytest.approx([averages[1], averages[3], averages[5], averages[7]], rel=1e-6)


# The best checkpoint


def best(folder: Path) -> tuple[int, float]:
    """Step and score of the best checkpoint, which is the file that best.ckpt leads to."""
    content = json.loads((folder / "checkpoints" / "best.json").read_text())
    path = folder / "checkpoints" / "best.ckpt"
    assert path.is_symlink()
    assert path.resolve().name == f"step_{content['step']}.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == content["step"]
    return content["step"], content["value"]


class Planned(Probe):
    """Scores in a given order: those during training, then of the few images and of all images at the end."""

    def __init__(self, *values: float, measure: str = "value", name: str = "probe") -> None:
        rest = iter(values)
        super().__init__(lambda _: next(rest), name, measure)


STEPS = {"every_n_epochs": None, "every_n_steps": 2, "quick": 5}  # 2, 4, 6, and 8 after the score of all images


@pytest.mark.parametrize(
    ("name", "measure", "values", "expected"),
    [
        ("probe", "value", (1, 3, 2, 2, 9), (4, 3)),
        *slow(
            ("probe_5", "value", (1, 3, 2, 4, 0), (8, 4)),
            ("probe", "value", (float("nan"), 2, 1, 0, 9), (4, 2)),
            ("probe_5", "t2i_median_rank", (3, 2, 1, 5, 9), (6, 1)),  # lower is better
        ),
    ],
)
def test_the_best_checkpoint_is_kept(
    tmp_path: Path, name: str, measure: str, values: tuple[float, ...], expected: tuple[int, float]
) -> None:
    keep = (f"callbacks.checkpoint.best={name}/{measure}", "callbacks.checkpoint.keep_last=1")
    train(tmp_path, *keep, evals=[Planned(*values, measure=measure)], **STEPS)
    assert best(tmp_path) == expected
    files = {path.name for path in (tmp_path / "checkpoints").glob("step_*.ckpt")}
    assert files == {"step_8.ckpt", f"step_{expected[0]}.ckpt"}
    assert (tmp_path / "checkpoints" / "last.ckpt").resolve().name == "step_8.ckpt"


@pytest.mark.slow
def test_the_best_so_far_survives_a_resumed_run(tmp_path: Path) -> None:
    keep = ("callbacks.checkpoint.best=probe/value", "callbacks.checkpoint.keep_last=1")
    train(tmp_path, *keep, "trainer.max_epochs=1", evals=[Planned(5, 0, 1)], **STEPS)
    assert best(tmp_path) == (2, 5)
    last = f"ckpt_path={tmp_path}/checkpoints/step_4.ckpt"
    train(tmp_path, *keep, last, evals=[Planned(4, 0, 3)], **STEPS)
    assert best(tmp_path) == (2, 5)
    train(tmp_path, *keep, last.replace("step_4", "step_8"), "trainer.max_epochs=3", evals=[Planned(6, 0, 3)], **STEPS)
    assert best(tmp_path) == (10, 6)
    last = f"ckpt_path={tmp_path}/checkpoints/step_12.ckpt"
    train(tmp_path, keep[1], last, "trainer.max_epochs=4", evals=[Planned(4, 0, 3)], **STEPS)
    assert (tmp_path / "checkpoints" / "best.ckpt").resolve().name == "step_10.ckpt"  # though none is asked for
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_a_score_of_other_images_is_not_the_best(tmp_path: Path) -> None:
    """Only the images change: 5 of them, and then 3. The best by the first 5 stays, too."""
    keep = ("callbacks.checkpoint.best=probe/value", "callbacks.checkpoint.keep_last=1")
    train(tmp_path, *keep, "trainer.max_epochs=1", evals=[Planned(5, 0, 1)], **STEPS)
    assert best(tmp_path) == (2, 5)
    checkpoints = tmp_path / "checkpoints"
    train(tmp_path, *keep, f"ckpt_path={checkpoints}/step_4.ckpt", evals=[Planned(4, 0, 3)], **(STEPS | {"quick": 3}))
    assert best(tmp_path) == (6, 4)
    assert (checkpoints / "earlier_best.ckpt").resolve() == checkpoints / "step_2.ckpt"
    assert {path.name for path in checkpoints.glob("step_*")} == {"step_2.ckpt", "step_6.ckpt", "step_8.ckpt"}
    train(tmp_path, *keep, f"ckpt_path={checkpoints}/step_8.ckpt", evals=[Planned(9, 9)], **(STEPS | {"quick": 2}))
    assert best(tmp_path) == (6, 4)  # of a finished run other scores alone were made


@pytest.mark.slow
def test_the_best_stays_where_a_link_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems without links."""
    monkeypatch.setattr(checkpoint, "atomic_link", lambda link, target: shutil.copy(target, link))
    keep = ("callbacks.checkpoint.best=probe/value", "callbacks.checkpoint.keep_last=1")
    train(tmp_path, *keep, evals=[Planned(5, 0, 1, 2, 3)], **STEPS)
    assert (tmp_path / "checkpoints" / "step_2.ckpt").exists()
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text())["value"] == 5


@pytest.mark.slow
def test_steps_that_are_made_again_do_not_hold_the_best(tmp_path: Path) -> None:
    keep = ("callbacks.checkpoint.best=probe/value", "callbacks.checkpoint.keep_last=9")
    train(tmp_path, *keep, evals=[Planned(1, 2, 7, 0, 3)], **STEPS)
    assert best(tmp_path) == (6, 7)
    train(tmp_path, *keep, f"ckpt_path={tmp_path}/checkpoints/step_4.ckpt", evals=[Planned(2, 0, 1)], **STEPS)
    assert best(tmp_path) == (6, 2)


def test_a_wrong_score_is_refused_before_training(tmp_path: Path) -> None:
    """12 images are scored, all of them."""
    with pytest.raises(ConfigError, match=r"callbacks.checkpoint.best.*scenes_256"):
        train(tmp_path, "callbacks.checkpoint.best=scenes_256/CIDEr", evals=[CaptionScores("scenes", RECORDS)])
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["valu", *slow("CIDEr")])  # near a score that there is, and near none
def test_a_wrong_score_of_an_own_metric_is_refused_when_it_is_known(tmp_path: Path, measure: str) -> None:
    with pytest.raises(ConfigError, match=rf"probe/{measure}.*probe/value"):
        train(tmp_path, f"callbacks.checkpoint.best=probe/{measure}", evals=[Probe(scale)])


@pytest.mark.parametrize(
    ("score", "at_end", "message"),
    [
        ("scene/CIDEr", True, "scene.*scenes"),
        ("scene/CIDEr", False, "scene.*scenes"),
        ("scenes/CIDER", True, "CIDER.*CIDEr"),
        ("scenes/Cider", False, "Cider.*CIDEr"),
        ("late/t2i_recal@1", True, "t2i_recal@1.*t2i_recall@1"),
        ("late/t2i_recall@1", False, "late.*at the end only"),
        ("scenes/near/CIDEr", False, "near/CIDEr"),  # kinds of captions are told apart at the end only
        ("scenes/near/CIDEr", True, None),
        ("late_8/t2i_recall@1", True, "late_8"),  # at the end all images are scored
        ("scenes/own_words", True, None),  # a measure of one's own
        ("late/reranked_t2i_recall@1", True, None),
        ("probe/anything", True, None),
    ],
)
def test_scores_are_checked_before_training(score: str, at_end: bool, message: str | None) -> None:
    measured = CaptionScores("scenes", RECORDS, measures={"own": lambda records, captions: {}})
    evals = [measured, RetrievalScores("late", RECORDS, every=0), Probe(scale)]
    scoring = ScoreDuringTraining(evals, Settings("unused"), quick=8)
    if message is None:
        scoring.check_score("key", score, at_end)
        return
    with pytest.raises(ConfigError, match=f"key.*{message}"):
        scoring.check_score("key", score, at_end)


@pytest.mark.slow
def test_the_scores_of_the_end_are_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_java(monkeypatch)
    evals = [CaptionScores("scenes", RECORDS, training_captions=lambda: ["one"]), RetrievalScores("scenes", RECORDS)]
    scoring = ScoreDuringTraining(evals, settings := Settings(tmp_path, rerank=2))
    for evaluation in evals:
        scores = evaluation.evaluate(create_model("coca_tiny"), settings)
        assert scores
        for score in (*scores, *(f"scenes/{name}" for name in CATEGORIES.values())):
            scoring.check_score("key", score, at_end=True)

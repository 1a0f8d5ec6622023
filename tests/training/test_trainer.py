"""What does not go together in a training is refused, by the keys that chose it, before the run folder is made."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest

from coca_lit.callbacks import ScoreDuringTraining
from coca_lit.cli.assembly import build_data, build_trainer
from coca_lit.cli.module import build_module
from coca_lit.errors import ConfigError
from coca_lit.evals import Settings
from coca_lit.models import create_model
from coca_lit.training.compatibility import (
    ACCUMULATION,
    AVERAGES,
    FP16,
    LORA,
    MICRO_BATCHES,
    NEEDS_WHOLE_BATCH,
    NEEDS_WHOLE_WEIGHTS,
    SHARDED,
    TABLE,
    TOKEN_MEANS,
    check_together,
    features,
)
from coca_lit.training.trainer import prepare
from helpers.running import compose, run

TINY = (
    *("trainer=smoke", "trainer.precision=32-true", "model.net.name=coca_tiny", "image_size=32", "evals=[]"),
    "model.freeze=[image_encoder]",
)
OWN_PASS = "+model.objectives.a._target_=helpers.objectives.OwnCaptions"
DRAWN = "+model.objectives.drawn._target_=helpers.objectives.DrawnTargets"
CHOICES = {
    SHARDED: ("trainer.strategy={_target_: coca_lit.training.sharding.FullySharded}",),
    MICRO_BATCHES: ("trainer.micro_batch_size=4",),
    AVERAGES: ("ema=0.9",),
    LORA: ("lora.rank=2",),
    NEEDS_WHOLE_WEIGHTS: (OWN_PASS,),
    NEEDS_WHOLE_BATCH: (OWN_PASS,),
    ACCUMULATION: ("trainer.accumulate_grad_batches=2",),
    TOKEN_MEANS: ("model.contrastive_weight=0",),
}
PAIRS = (  # stated here too, so that a row that the table loses is missed
    (SHARDED, AVERAGES),
    (SHARDED, LORA),
    (SHARDED, NEEDS_WHOLE_WEIGHTS),
    (MICRO_BATCHES, FP16),
    (MICRO_BATCHES, NEEDS_WHOLE_BATCH),
    (ACCUMULATION, TOKEN_MEANS),
)


def test_the_table_has_all_pairs() -> None:
    assert {(one, other) for one, other, _ in TABLE} == {*PAIRS}


@pytest.mark.parametrize("row", [pair for pair in PAIRS if FP16 not in pair], ids="-".join)
def test_every_row_is_refused_by_its_keys(tmp_path: Path, row: tuple[str, str]) -> None:
    words = [word for feature in row for word in CHOICES[feature]]
    with pytest.raises(ConfigError, match="does not work with"):
        run(tmp_path / "run", *TINY, *words)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_features_are_found_by_what_was_built(tmp_path: Path) -> None:
    cfg = compose(*TINY, "ema=0.9", "lora.rank=2", OWN_PASS, "+model.objectives.b=null", f"output_dir={tmp_path}")
    module, trainer = build_module(cfg), build_trainer(cfg, ScoreDuringTraining([], Settings(tmp_path)))
    found = features(trainer, module.net, [*module.objectives.values()], None)
    whole = dict.fromkeys((NEEDS_WHOLE_WEIGHTS, NEEDS_WHOLE_BATCH, TOKEN_MEANS), "model.objectives.a")
    assert found == {AVERAGES: "ema", LORA: "lora"} | whole
    check_together(found)


def test_fp16_and_micro_batches() -> None:
    """A CPU computes in bf16 instead."""
    trainer: Any = SimpleNamespace(strategy=None, precision="16-mixed", callbacks=[], accumulate_grad_batches=1)
    found = features(trainer, create_model("coca_tiny"), [], 4)
    with pytest.raises(ConfigError, match=r"trainer.micro_batch_size .*trainer.precision=16-mixed"):
        check_together(found)


def test_a_validation_that_no_epoch_reaches_is_refused(tmp_path: Path) -> None:
    """Lightning would stop the run when it has begun."""
    for words, refused in (
        (["trainer.val_check_interval=5"], True),
        (["trainer.val_check_interval=4"], False),
        (["trainer.val_check_interval=4", "trainer.limit_train_batches=3"], True),
        (["trainer.val_check_interval=3", "trainer.limit_train_batches=0.5"], True),
        (["trainer.val_check_interval=5", "trainer.limit_val_batches=0"], False),
        (["trainer.val_check_interval=5", "trainer.check_val_every_n_epoch=null"], False),
    ):
        batches = ("data.train_count=32", "data.batch_size=8", "trainer.limit_train_batches=1.0")
        cfg = compose(*TINY, *batches, f"output_dir={tmp_path}", *words)
        module, trainer = build_module(cfg), build_trainer(cfg, ScoreDuringTraining([], Settings(tmp_path)))
        data = build_data(cfg, module.net.tokenizer)
        with pytest.raises(ConfigError, match=r"trainer\.val_check_interval=\d") if refused else nullcontext():
            prepare(trainer, module, data)


def test_rates_that_cannot_fall_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose(*TINY[:-1], f"output_dir={tmp_path}", "model.optimizer.layer_decay=0.5")
    module, trainer = build_module(cfg), build_trainer(cfg, ScoreDuringTraining([], Settings(tmp_path)))
    monkeypatch.setattr(module.net.image_encoder, "depths", lambda: {})
    with pytest.raises(ConfigError, match=r"model\.optimizer: layer_decay"):
        prepare(trainer, module, build_data(cfg, module.net.tokenizer))


def test_hyperparameters_that_no_checkpoint_may_hold_are_refused(tmp_path: Path) -> None:
    class Own(L.LightningDataModule):
        def __init__(self, tokenizer: Any, size: int) -> None:
            super().__init__()
            self.save_hyperparameters(ignore=["tokenizer"] if size == 1 else [])

    cfg = compose(*TINY, f"output_dir={tmp_path}")
    module, trainer = build_module(cfg), build_trainer(cfg, ScoreDuringTraining([], Settings(tmp_path)))
    prepare(trainer, module, Own(module.net.tokenizer, 1))
    with pytest.raises(ConfigError, match=r"data: save_hyperparameters.*ignore="):
        prepare(trainer, module, Own(module.net.tokenizer, 2))


@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averages_that_would_miss_scores_and_checkpoints_are_refused(tmp_path: Path, kind: str) -> None:
    rate = ["+callbacks.mine.swa_lrs=0.1"] if kind.startswith("Stochastic") else []
    cfg = compose(
        *TINY, f"output_dir={tmp_path}", f"+callbacks.mine._target_=lightning.pytorch.callbacks.{kind}", *rate
    )
    with pytest.raises(ConfigError, match=f"{kind} .*ema=DECAY"):
        build_trainer(cfg, ScoreDuringTraining([], Settings(tmp_path)))


def test_an_objective_says_what_it_needs_of_weights_and_data(tmp_path: Path) -> None:
    cfg = compose(*TINY, DRAWN, f"output_dir={tmp_path}")
    module, trainer = build_module(cfg), build_trainer(cfg, ScoreDuringTraining([], Settings(tmp_path)))
    found = features(trainer, module.net, module.every_objective, None)
    assert found[NEEDS_WHOLE_WEIGHTS] == "model.objectives.drawn"
    with pytest.raises(ConfigError, match=r"drawn .*LightningDataModule"):
        prepare(trainer, module, L.LightningDataModule())
    with pytest.raises(ConfigError, match=r"trainer=fsdp .*model\.objectives\.drawn"):
        check_together(found | {SHARDED: "trainer=fsdp"})

"""Training itself: it repeats, freezes, averages, clips, and says how it goes."""

import math
import re
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._dynamo.utils import counters

from coca_lit.callbacks import ScoreDuringTraining
from coca_lit.callbacks.averaging import Averaging
from coca_lit.cli.assembly import build, build_trainer
from coca_lit.cli.module import build_module
from coca_lit.data.batch import Batch
from coca_lit.errors import ConfigError
from coca_lit.evals import Settings
from coca_lit.lit_module import CoCaLit
from coca_lit.losses import contrastive_loss
from coca_lit.models import CoCa, create_model
from coca_lit.models.coca import MAX_LOGIT_SCALE
from coca_lit.training.optim import AdamW
from coca_lit.training.trainer import prepare
from coca_lit.weights.load import load_model
from helpers.running import compose, logged, run
from helpers.slow import slow

# Two epochs of four steps on the CPU and nothing else.
SHORT = (
    *("trainer=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=0"),
    *("data.train_count=32", "data.batch_size=8", "model.warmup_steps=2", "evals=[]"),
)


def new_module(cfg: DictConfig) -> CoCaLit:
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    return build_module(cfg)


def fit(folder: Path, *overrides: str, watch: L.Callback | None = None) -> CoCaLit:
    """`run` with one more callback; returns the trained module."""
    cfg = compose(*SHORT, f"output_dir={folder}", *overrides)
    module = new_module(cfg)
    data = build(cfg.data, "data", tokenizer=module.net.tokenizer)
    trainer = build_trainer(cfg, ScoreDuringTraining([], Settings(folder)))
    trainer.callbacks += [watch] if watch else []
    prepare(trainer, module, data)
    trainer.fit(module, datamodule=data, ckpt_path=None if cfg.ckpt_path == "auto" else cfg.ckpt_path)
    return module


class Gradients(L.Callback):
    """The gradient of each step, of one of the weights."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.found.append(pl_module.net.text.token_embedding.weight.grad.clone())


def test_a_step_is_the_mean_of_its_batches_however_many_there_are(tmp_path: Path) -> None:
    """Four batches an epoch, three of them in the first step and one in the second; nothing learns."""
    words = ("model.optimizer.lr=0", "model.caption_weight=0", "trainer.max_epochs=1", "trainer.gradient_clip_val=null")
    fit(tmp_path / "one", *words, watch=(one := Gradients()))
    fit(tmp_path / "three", *words, "trainer.accumulate_grad_batches=3", watch=(three := Gradients()))
    expected = [torch.stack(one.found[:3]).mean(dim=0), one.found[3]]
    torch.testing.assert_close(three.found, expected)


def test_values_are_not_clipped_one_by_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.gradient_clip_algorithm"):
        fit(tmp_path, "+trainer.gradient_clip_algorithm=value")


@pytest.mark.parametrize("wrong", ["gradient_clip_val=nan", "accumulate_grad_batches=0"])
def test_a_wrong_number_is_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer: {wrong.partition('=')[0]}.*[01]"):
        fit(tmp_path, f"trainer.{wrong}")


class AfterStep(L.Callback):
    """Calls `look(net, step)` after every step; `final` are the weights when an evaluation would score them."""

    def __init__(self, look: Callable[[CoCa, int], None]) -> None:
        self.look = look
        self.final: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.look(pl_module.net, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.final = tensors(pl_module.net)


def tensors(net: CoCa) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.slow
def test_seed_decides(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / folder, *SHORT, f"seed={seed}", "trainer.max_epochs=1", "data.train_count=16")
    a, b, c = (logged(tmp_path / folder, "_loss") for folder in "abc")
    assert a == b
    assert all(x != y for name in a for x, y in zip(a[name], c[name], strict=True))


# Weights of the losses


def test_raw_losses_are_logged_and_their_weighted_sum_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    net = create_model("coca_tiny").eval()
    tokens = net.tokenizer(["a red circle", "a blue square left of a green circle"])
    batch = Batch(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), tokens, (tokens > 0).sum(1), ["", ""])
    out = net(batch.images, batch.tokens, batch.lengths)
    raw = {
        "train/contrastive_loss": contrastive_loss(out.image_features, out.text_features, out.logit_scale).detach(),
        "train/caption_loss": torch.nn.functional.cross_entropy(out.logits, out.labels).detach(),
    }
    module, logged = CoCaLit(net, AdamW(lr=0.1), contrastive_weight=0.25, caption_weight=3.0), {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    monkeypatch.setattr(module, "log", lambda *_: None)
    monkeypatch.setattr(module, "logs_this_step", lambda: True)
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(logged, raw)
    assert loss.item() == pytest.approx(0.25 * raw["train/contrastive_loss"] + 3 * raw["train/caption_loss"])


@pytest.mark.parametrize(
    ("weight", "said", "frozen", "loss"),
    [
        (
            "model.contrastive_weight=0",
            "image_projection, text.cls_embedding, text.norm, text.projection, logit_scale (",
            ("image_projection.", "text.cls_embedding", "text.norm.", "text.projection.", "logit_scale"),
            "train/caption_loss",
        ),
        ("model.caption_weight=0", "decoder (", ("decoder.",), "train/contrastive_loss"),
        ("model.freeze=[image_encoder,decoder]", "image_encoder, decoder (", ("image_encoder.", "decoder."), None),
    ],
)
def test_frozen_parts_are_named_and_stay(
    tmp_path: Path,
    weight: str,
    said: str,
    frozen: tuple[str, ...],
    loss: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = tensors(new_module(compose(*SHORT, weight)).net)
    net = fit(tmp_path, weight, "trainer.max_epochs=1").net
    assert said in capsys.readouterr().out
    for name, tensor in tensors(net).items():
        assert torch.equal(tensor, before[name]) == name.startswith(frozen), name
    assert loss is None or set(logged(tmp_path, "_loss")) == {loss}


@pytest.mark.parametrize("weights", [{"contrastive_weight": 0, "caption_weight": 0}, {"caption_weight": -1}])
def test_weights_that_leave_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="caption_weight"):
        CoCaLit(create_model("coca_tiny"), AdamW(lr=0.1), **weights)


# Averages, precision, compilation


def test_averaged_weights_are_scored_and_saved(tmp_path: Path) -> None:
    steps: list[dict[str, Tensor]] = []
    watch = AfterStep(lambda net, _: steps.append(tensors(net)))
    net = fit(tmp_path, "ema=0.75", "trainer.max_epochs=1", watch=watch).net
    average = steps[0]
    for now in steps[1:]:
        average = {name: 0.75 * average[name] + 0.25 * now[name] for name in average}
    assert len(steps) == 4
    torch.testing.assert_close(tensors(net), average)
    torch.testing.assert_close(watch.final, average)
    torch.testing.assert_close(tensors(load_model(tmp_path / "checkpoints" / "last.ckpt")), average)
    assert not torch.allclose(average["image_projection.weight"], steps[-1]["image_projection.weight"])


@pytest.mark.parametrize(("decay", "steps"), [(0.9999, 2000), (0.999, 4000), (0.9999, math.inf), (0.9999, -1), (1, 11)])
def test_an_average_of_hardly_trained_weights_is_announced(
    decay: float, steps: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """The share of the first weights is what the average has of 1 where all later ones are 0."""

    def share_of_the_first(decay: float) -> float:
        share = 1.0
        for _ in range(int(steps) - 1):
            share -= (1 - decay) * share
        return share

    trainer: Any = SimpleNamespace(estimated_stepping_batches=steps)
    Averaging(decay).on_train_start(trainer, L.LightningModule())
    said = capsys.readouterr().out
    if not 0 < steps < math.inf or share_of_the_first(decay) <= 0.05:
        assert not said
        return
    found = re.search(r"note: (\d+) % of .* first of ([\d,]+) steps: set ema=([\d.]+), or ema=null", said)
    assert int(found[1]) == pytest.approx(100 * share_of_the_first(decay), abs=0.5)
    assert int(found[2].replace(",", "")) == steps
    assert share_of_the_first(float(found[3])) < 1e-4


def test_the_average_keeps_to_the_range_of_the_temperature(tmp_path: Path) -> None:
    """A step beyond the largest one is taken back before it is averaged."""

    class Beyond(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            with torch.no_grad():
                pl_module.net.logit_scale.fill_(MAX_LOGIT_SCALE)
            pl_module.net.logit_scale.grad = -torch.ones_like(pl_module.net.logit_scale)

    one_step = ("trainer.max_steps=1", "model.optimizer.lr=0.05", "model.warmup_steps=0")
    net = fit(tmp_path, "ema=0", *one_step, watch=Beyond()).net
    assert net.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)


@pytest.mark.parametrize("precision", ["32-true", *slow("bf16-true")])
def test_gradients_are_clipped(tmp_path: Path, precision: str) -> None:
    norms: list[float] = []

    def look(net: CoCa, _: int) -> None:
        norms.append(nn.utils.get_total_norm([p.grad.float() for p in net.parameters() if p.grad is not None]).item())

    overrides = (f"trainer.precision={precision}", "trainer.gradient_clip_val=0.01", "trainer.max_epochs=1")
    fit(tmp_path, *overrides, watch=AfterStep(look))
    assert norms == pytest.approx([0.01] * 4, rel=0.02)
    assert 2 < logged(tmp_path, "_loss")["train/caption_loss"][-1] < 6
    assert min(logged(tmp_path)["train/grad_norm"]) > 0.1


@pytest.mark.slow
def test_compiled_network_trains_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_blocks = partialmethod(CoCa.compile_blocks, backend="eager")
    monkeypatch.setattr(CoCa, "compile_blocks", compile_blocks)
    small = ("trainer.max_steps=2", "+model.net.text_layers=1", "+model.net.decoder_layers=1")
    graphs = counters["stats"]["unique_graphs"]
    for folder in ("false", "true"):
        assert counters["stats"]["unique_graphs"] == graphs
        fit(tmp_path / folder, f"model.compile={folder}", *small)
    assert counters["stats"]["unique_graphs"] > graphs
    for name, values in logged(tmp_path / "true", "_loss").items():
        assert values == pytest.approx(logged(tmp_path / "false", "_loss")[name], rel=1e-4)
    load_model(tmp_path / "true" / "checkpoints" / "last.ckpt")  # with the names of a plain network


# What one sees


SUMMARY = tuple(f"{name:8}" for name in ("model", "device", "data", "steps", "scores", "folder"))


@pytest.mark.slow
def test_plain_lines_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, *SHORT, "trainer.log_every_n_steps=2")
    number = r"\d+(\.\d+)?"
    values = rf"train/contrastive_loss {number} · train/caption_loss {number} · samples/s {number}"
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if re.match(r"step \d", line)]
    assert [line.split(" ", 2)[1] for line in lines] == ["2/8", "4/8", "6/8", "8/8"]
    for line, epoch in zip(lines, (1, 1, 2, 2), strict=True):
        assert re.fullmatch(rf"step \d/8 · epoch {epoch} · ETA \d:\d\d:\d\d · {values}", line), line
    assert "ETA 0:00:00" in lines[-1]
    weights = sum(tensor.numel() for name, tensor in load_model(tmp_path / "checkpoints/last.ckpt").named_parameters())
    summary = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith(SUMMARY))
    assert summary["model"] == f"CoCa, {weights / 1e6:.1f} M parameters, {weights / 1e6:.1f} M trained"
    assert summary["device"] == "cpu, 1 process, precision 32-true"
    assert (summary["data"], summary["steps"]) == ("ScenesDataModule, 4 batches an epoch of 8", "8")
    assert summary["folder"] == str(tmp_path)

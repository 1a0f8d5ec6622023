"""Training on texts between pairs: what it trains, and that neither ranks nor interruptions matter."""

import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from coca_lit.cli.command import compose as compose_command
from coca_lit.cli.module import build_module
from coca_lit.data.batch import Batch
from coca_lit.data.scenes.render import scene_training_captions
from coca_lit.distributed import rank, world_size
from coca_lit.errors import ConfigError, DataError
from coca_lit.lit_module import CoCaLit
from coca_lit.models import create_model
from coca_lit.projects.texts.batches import TextBatches, TextsBetweenPairs
from coca_lit.projects.texts.objective import TextLoss
from coca_lit.testing import ENCODER, PAIRS, Step, own_batch
from coca_lit.tokenizer import get_tokenizer
from coca_lit.tools.plan import command as plan
from coca_lit.training.optim import AdamW
from coca_lit.training.trainer import ddp_options
from coca_lit.weights.load import load_model
from helpers.objectives import check_means
from helpers.resuming import MAP, Die, assert_same, rows
from helpers.resuming import train as train_apart
from helpers.running import compose, run

SHORT = (
    *("trainer=cpu", "trainer.max_epochs=2", "trainer.limit_val_batches=0", "data.train_count=32", "data.batch_size=8"),
    *("trainer.log_every_n_steps=1", "model.warmup_steps=2", "evals=[]", "model.net.dropout=0.1"),
    *("+model.net.text_layers=1", "+model.net.decoder_layers=1"),
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "captions.txt"
    path.write_text("\n".join(scene_training_captions()[:40]))
    return f"data.text={path}"


def weights(folder: Path, name: str = "last.ckpt") -> dict[str, Tensor]:
    return load_model(folder / "checkpoints" / name).state_dict()


@pytest.mark.slow
def test_a_run_on_texts_alone_and_one_that_starts_from_it(tmp_path: Path, texts: str) -> None:
    alone = ("data.text_every=1", "model.contrastive_weight=0", "trainer.max_epochs=1")
    parts = "model.freeze=[image_encoder,pooling,decoder.cross_blocks]"
    run(tmp_path / "texts", *SHORT, texts, *alone, parts)
    log = (tmp_path / "texts" / "metrics.csv").read_text()
    assert "train/text_loss" in log
    assert "train/caption_loss" not in log
    pretrained = tmp_path / "texts" / "checkpoints" / "last.ckpt"
    run(tmp_path / "pairs", *SHORT, f"init_from={pretrained}", "trainer.max_epochs=1", "model.optimizer.lr=0")
    torch.testing.assert_close(
        weights(tmp_path / "pairs")["decoder.norm.weight"], weights(tmp_path / "texts")["decoder.norm.weight"]
    )


# Several processes


def train(kinds: str, file: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Weights after a step on each of the given kinds of batches, p for pairs and t for texts."""
    torch.manual_seed(0)
    net = create_model("coca_tiny", **ENCODER).train()
    module = CoCaLit(net, AdamW(lr=0.0), batch_schedule=TextsBetweenPairs(file), **options)
    step: Any = Step(module)
    if world_size() > 1:
        step = DistributedDataParallel(step, **ddp_options(has_schedule=True, same_graph=True))
    batches = TextBatches(file, net.tokenizer, PAIRS, net.image_size)
    trainable = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1, momentum=0.9, weight_decay=0.01)  # moves what has a gradient of 0
    for number, kind in enumerate(kinds):
        batch: Batch = own_batch(net, number) if kind == "p" else batches.batch(number, rank(), world_size())
        optimizer.zero_grad()
        step(batch).backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*find_unused_parameters")
def test_texts_between_pairs_on_two_ranks_are_those_of_one_process(on_ranks: Any, texts: str) -> None:
    file = texts.removeprefix("data.text=")
    alone = train("ptpt", file, {})
    for found in on_ranks(2, train, "ptpt", file, {}):
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_texts_are_split_evenly_over_ranks(texts: str) -> None:
    batches = TextBatches(texts.removeprefix("data.text="), get_tokenizer("clip"), 6, 32)
    parts = [batches.batch(8, rank, 3).keys for rank in range(3)]
    assert [*itertools.chain(*zip(*parts, strict=True))] == batches.batch(8).keys
    with pytest.raises(DataError, match=r"6 .* 4 processes"):
        batches.batch(0, 0, 4)


def test_a_step_of_texts_leaves_the_image_half_alone(texts: str) -> None:
    torch.manual_seed(0)
    before = dict(create_model("coca_tiny", **ENCODER).named_parameters())
    after = train("t", texts.removeprefix("data.text="), {})
    kept = ("image_encoder.", "pooling.", "image_projection.", "decoder.cross_blocks.", "logit_scale")
    for name, tensor in after.items():
        if name.startswith(kept):
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(after["decoder.vocabulary.weight"], before["decoder.vocabulary.weight"])


@pytest.mark.parametrize(("text_weight", "trains"), [(1.0, True), (0.0, False)])
def test_the_loss_of_texts_trains_the_decoder_without_a_caption_loss(text_weight: float, trains: bool) -> None:
    overrides = ("model.caption_weight=0", f"model.text_weight={text_weight}", "data.text=texts.txt")
    decoder = build_module(compose(*SHORT, *overrides)).net.decoder
    assert decoder is not None
    assert decoder.vocabulary.weight.requires_grad == trains


def test_two_batches_of_texts_do_not_have_the_mean_of_both() -> None:
    check_means(TextLoss(1.0), "text", over_tokens=True)


def test_texts_need_a_decoder(tmp_path: Path, texts: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.text does not work with model\.net\.decoder_layers=0"):
        run(tmp_path / "run", *SHORT[:-1], "+model.net.decoder_layers=0", texts)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_plan_says_that_batches_of_texts_are_not_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "estimate", lambda *_: (None, None, None))
    monkeypatch.setattr("coca_lit.tools.plan.estimate.print_plan", lambda *_: None)
    plan.run(compose_command("plan", ["data.text=texts.txt"]))
    assert capsys.readouterr().out == "Not counted: data.text, whose batches are steps of their own.\n"


def test_texts_that_train_nothing_are_refused(texts: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.text"):
        train("t", texts.removeprefix("data.text="), {"freeze": ["text", "decoder"]})


def test_micro_batches_are_for_pairs(texts: str) -> None:
    """Batches of texts go through whole, with the same result."""
    file = texts.removeprefix("data.text=")
    torch.testing.assert_close(train("ptp", file, {"micro_batch_size": 2}), train("ptp", file, {}), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_killed_within_an_epoch_and_at_the_end(tmp_path: Path, texts: str) -> None:
    """Batch 5 is of pairs, after the validation within the epoch, 12 the very last, of texts."""
    overrides = (*MAP, texts, "data.text_every=3", "callbacks.checkpoint.every_n_steps=1")
    assert train_apart(tmp_path / "whole", *overrides) == 0
    for batches in (5, 12):
        assert train_apart(tmp_path / "killed", *overrides, watch=Die(batches)) == -signal.SIGKILL
    assert train_apart(tmp_path / "killed", *overrides) == 0
    assert_same(tmp_path / "whole", tmp_path / "killed")
    steps = [row for row in rows(tmp_path / "whole") if row["train/text_loss"] or row["train/contrastive_loss"]]
    of_texts = [bool(row["train/text_loss"]) for row in steps]
    assert of_texts == [False, False, True] * (len(steps) // 3)
    assert [bool(row["train/contrastive_loss"]) for row in steps] == [not text for text in of_texts]

"""Whole runs through Lightning on two gloo processes, under DDP and sharded, against one process."""

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from coca_lit.cli.command import compose as compose_config
from coca_lit.distributed import world_size
from coca_lit.errors import ConfigError
from coca_lit.losses import loss_terms
from coca_lit.models import CoCa, create_model
from coca_lit.tools.export import command as export
from coca_lit.training.sharding import check_sharded, shard, unsharded
from coca_lit.weights.load import load_model
from helpers.family import check_sharded_training
from helpers.parallel import DDP, SHARDED, SHORT, UNSCORED, saved, train
from helpers.running import launched, results, run, without_java

pytestmark = pytest.mark.filterwarnings("ignore")
VIT = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
MODEL = {"image_encoder": "vit_base_patch32_clip_224", "image_encoder_args": VIT}
SCORED = (*UNSCORED, "evals=[scenes_captions,scenes_retrieval]", "scoring.images=8", "data.train_count=16")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("one")
    run(folder, *SHORT, "data.train_count=16")
    return folder


def test_ddp_equals_one_process(on_ranks, tmp_path: Path, one_process: Path) -> None:
    on_ranks(2, train, tmp_path, "data.train_count=16", *DDP)
    expected, found = saved(one_process), saved(tmp_path)
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], atol=2e-6, rtol=0)


def train_sharded(folder: Path, one: Path) -> dict[str, Any]:
    """All that is tested of sharding, in one process group: torch remembers parts of tensors by rank."""
    options = ("data.train_count=16", *SHARDED)
    train(folder, *options)
    train(folder / "checkpointing", *options, "model.grad_checkpointing=blocks")
    for name, start in (("on", folder), ("on_from_one", one)):
        train(folder / name, *options, "trainer.max_epochs=2", f"ckpt_path={start}/checkpoints/last.ckpt")
    return sharded_model()


@pytest.fixture(scope="module")
def sharded(on_ranks, tmp_path_factory: pytest.TempPathFactory, one_process: Path) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("sharded")
    return folder, on_ranks(2, train_sharded, folder, one_process)


@pytest.mark.slow
def test_sharded_training_equals_one_process(sharded, one_process: Path, tmp_path: Path) -> None:
    """With clipping; and over a checkpoint, a file like any other, of a sharded run and of one process."""
    folder, _ = sharded
    expected, found = saved(one_process), saved(folder)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], atol=2e-6, rtol=0)
    moments = found["optimizer_states"][0]["state"], expected["optimizer_states"][0]["state"]
    torch.testing.assert_close(*moments, atol=1e-5, rtol=1e-4)
    checkpointing = saved(folder / "checkpointing")
    torch.testing.assert_close(checkpointing["state_dict"], expected["state_dict"], atol=2e-6, rtol=0)
    load_model(folder / "checkpoints" / "last.ckpt")
    last = f"ckpt_path={one_process}/checkpoints/last.ckpt"
    run(tmp_path, *SHORT, "data.train_count=16", "trainer.max_epochs=2", last)
    longer = saved(tmp_path)
    for name in ("on", "on_from_one"):
        torch.testing.assert_close(saved(folder / name)["state_dict"], longer["state_dict"], atol=4e-6, rtol=0)


FURTHER = ("data.captions=3", "+model.objectives.further._target_=helpers.objectives.FurtherTexts")


@pytest.mark.slow
def test_further_captions_in_sharded_training(on_ranks, tmp_path: Path) -> None:
    check_sharded_training(on_ranks, tmp_path, *FURTHER)


def test_further_captions_and_an_objective_that_reads_them_belong_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objectives\.further .*data\.captions=2"):
        train(tmp_path, FURTHER[1])
    with pytest.raises(ConfigError, match=r"data\.captions=3: no objective reads"):
        train(tmp_path, FURTHER[0])


def gradients(bf16: bool, sharded: bool) -> dict[str, torch.Tensor]:
    """Of the same pairs on every rank. GPUs compute norms in fp32 under autocast, whatever their weights are; CPUs need
    inputs of the type of the weights.
    """
    torch.manual_seed(0)
    net = create_model("coca_tiny", **MODEL).train()
    if sharded:
        shard(net, init_device_mesh("cpu", (world_size(),)), half=True)
        for norm in (module for module in net.modules() if isinstance(module, nn.LayerNorm)):
            norm.register_forward_pre_hook(lambda norm, x: (x[0].to(norm.weight.dtype),))
    images, texts = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), ["a red circle", "a blue square"]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        terms = loss_terms(net(images, net.tokenizer(texts)))
    torch.stack(list(terms.values())).sum().backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}


@pytest.mark.slow
def test_blocks_that_are_gathered_in_bf16(on_ranks) -> None:
    """Their gradients are as near to the unsharded ones in bf16 as these to those in fp32, and are stored in fp32. The
    temperature, which bf16 would round, is in no block.
    """
    both = on_ranks(2, gradients, True, True)
    exact, expected = gradients(False, False), gradients(True, False)
    for found in both:
        assert found.keys() == expected.keys()
        assert {x.dtype for x in found.values()} == {torch.float32}
        for name, gradient in expected.items():
            rounding, scale = (gradient - exact[name]).norm(), exact[name].norm()
            assert (found[name] - gradient).norm() < 3 * rounding + 0.02 * scale, name


def train_compiled(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:  # Inductor would take a minute and a half; test_packing.py covers it
        patch.setattr(CoCa, "compile_blocks", partialmethod(CoCa.compile_blocks, backend="aot_eager"))
        train(folder, "data.train_count=16", *SHARDED, "+model.compile=true")


@pytest.mark.slow
def test_compiled_sharded_training_equals_one_process(on_ranks, tmp_path: Path, one_process: Path) -> None:
    """The compiled graphs, forward and backward, see whole weights on each of two processes."""
    on_ranks(2, train_compiled, tmp_path)
    torch.testing.assert_close(saved(tmp_path)["state_dict"], saved(one_process)["state_dict"], atol=5e-6, rtol=0)


def train_and_score(folder: Path) -> dict[str, float]:
    with launched(), pytest.MonkeyPatch.context() as patch:
        without_java(patch)
        return run(folder, *SCORED, *SHARDED)


@pytest.mark.slow
def test_a_sharded_experiment_is_scored_and_exported(on_ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first step to a file for other programs: scores and captions equal a single process's."""
    without_java(monkeypatch)
    one, sharded, exported = tmp_path / "one", tmp_path / "sharded", tmp_path / "exported"
    scores = run(one, *SCORED)
    for found in on_ranks(2, train_and_score, sharded):
        assert found == pytest.approx(scores, abs=1e-6)
    assert results(sharded) == pytest.approx(results(one), abs=1e-6)
    captions = [(folder / "predictions" / "scenes.json").read_text() for folder in (one, sharded)]
    assert captions[0] == captions[1]
    trained = load_model(sharded / "checkpoints" / "last.ckpt")
    chosen = [f"checkpoint={sharded}/checkpoints/last.ckpt", "format=safetensors", f"output={exported}"]
    export.run(compose_config("export", chosen))
    again = load_model(exported / "model.safetensors")
    torch.testing.assert_close(again.state_dict(), trained.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(
        again.state_dict(), load_model(one / "checkpoints/last.ckpt").state_dict(), atol=1e-5, rtol=0
    )
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(again.generate(images), trained.generate(images))


def train_recipe(folder: Path, *overrides: str) -> None:
    with launched():
        run(folder, *(word for word in SHORT if not word.startswith("experiment=")), *overrides)


@pytest.mark.slow
def test_openclips_recipe_for_mscoco_runs_on_two_ranks(on_ranks, tmp_path: Path) -> None:
    """Contrastive weight 0, where OpenCLIP stops with unused parameters in the second step."""
    recipe = (
        "experiment=finetune_mscoco",
        "data=scenes",
        "init_from=null",
        "model.net.name=coca_tiny",
        "image_size=32",
    )
    on_ranks(2, train_recipe, tmp_path, *recipe, "data.train_count=24", *DDP)
    assert saved(tmp_path)["global_step"] == 3


def sharded_model() -> dict[str, Any]:
    torch.manual_seed(0)
    net = create_model("coca_tiny", **MODEL).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        whole = (net.encode_image(images), net.generate(images))
    shard(net, init_device_mesh("cpu", (world_size(),)))
    own = sum(p.to_local().numel() for p in net.parameters())
    with torch.no_grad():
        net(images, net.tokenizer(["a red circle", "a blue square"]))
    full = unsharded(net)
    with torch.no_grad():
        parts = (full.encode_image(images), full.generate(images))
    again = sum(p.to_local().numel() for p in net.parameters())
    net.forgotten = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"not sharded.* forgotten$"):
        check_sharded(net)
    return {"whole": whole, "parts": parts, "own": own, "again": again}


@pytest.mark.slow
def test_each_rank_holds_its_part_and_scores_with_all(sharded) -> None:
    count = sum(p.numel() for p in create_model("coca_tiny", **MODEL).parameters())
    _, results = sharded
    assert sum(result["own"] for result in results) == count
    for result in results:
        assert result["own"] == result["again"] < 0.6 * count
        torch.testing.assert_close(result["parts"], result["whole"], atol=1e-6, rtol=0)


# Objectives with parameters

WORDS = "+model.objectives.mine._target_=helpers.objectives.WordsOfImages"
SCORE = (
    "evals=[]",
    "+evals.mine={_target_: helpers.objectives.LikeliestWords, records: {split: val, count: 8, size: 32, "
    "_target_: coca_lit.data.scenes.render.scene_records}}",
)


def train_with_words(folder: Path, *overrides: str) -> dict[str, float]:
    with launched():
        return run(folder, *UNSCORED, "data.train_count=16", WORDS, *SCORE, *SHARDED, *overrides)


@pytest.mark.slow
def test_micro_batches_of_a_sharded_network_equal_the_whole_batch(on_ranks, tmp_path: Path) -> None:
    score = run(tmp_path / "one", *UNSCORED, "data.train_count=16", WORDS, *SCORE)
    micro = "trainer.micro_batch_size=2"
    assert on_ranks(2, train_with_words, tmp_path / "sharded", micro) == [score, score]
    found, expected = saved(tmp_path / "sharded")["state_dict"], saved(tmp_path / "one")["state_dict"]
    assert found.pop("objectives.mine.steps") == expected.pop("objectives.mine.steps")
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_parameters_of_an_objective_are_sharded_like_the_network(on_ranks, tmp_path: Path, one_process: Path) -> None:
    """They end where one process ends, are scored alike, and are kept with the model."""
    score = run(tmp_path / "one", *UNSCORED, "data.train_count=16", WORDS, *SCORE)
    assert on_ranks(2, train_with_words, tmp_path / "sharded") == [score, score]
    found, expected = saved(tmp_path / "sharded")["state_dict"], saved(tmp_path / "one")["state_dict"]
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert not torch.allclose(
        found["net.pooling.generative.query"], saved(one_process)["state_dict"]["net.pooling.generative.query"]
    )
    kept = load_model(tmp_path / "sharded" / "checkpoints" / "last.ckpt").objectives["mine"]
    assert kept.steps == 2
    torch.testing.assert_close(kept.head.weight, expected["objectives.mine.head.weight"], atol=2e-6, rtol=0)


# Set-ups that are refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*SHARDED, "ema=0.99"), "trainer=fsdp .* ema"),
        (("trainer.strategy=deepspeed_stage_2",), "trainer.strategy=deepspeed_stage_2"),
        (("data.batch_size=9", *DDP), "data.batch_size.* 9 .* 2"),
    ],
)
def test_wrong_set_ups_are_refused(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, *SHORT, *overrides)

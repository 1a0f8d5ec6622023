"""Every config composes and builds; a mistake in one is a sentence that says what was meant."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, Unpack

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig, OmegaConf
from running import ROOT, TINY, compose, train_py

from coca_lit.cli import command
from coca_lit.cli.assembly import build, build_module, build_trainer, resolve_target
from coca_lit.cli.command import CONF, check, to_override
from coca_lit.errors import ConfigError, UserError, error_context
from coca_lit.lit_module import CoCaLit

FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
GROUPS = ("callbacks", "data", "evals", "experiment", "logger", "model", "trainer")
OPTIONS = {
    group: [path.name for path in FILES if path.parent == Path(group) and path.name[0] != "_"] for group in GROUPS
}


@cache
def default() -> Any:
    return OmegaConf.to_container(compose())


@pytest.mark.parametrize("experiment", OPTIONS["experiment"])
def test_experiment_takes_the_advertised_overrides(experiment: str) -> None:
    weights = ("model.contrastive_weight=0.5", "model.caption_weight=3", "model.optimizer.lr=0.25")
    cfg = compose(f"experiment={experiment}", *weights, "output_dir=x", "name=x")
    values = (cfg.model.contrastive_weight, cfg.model.caption_weight, cfg.model.optimizer.lr)
    assert values == (0.5, 3, 0.25)
    check(OmegaConf.to_container(cfg), default())
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize(
    ("group", "option"), [(group, option) for group in GROUPS if group != "experiment" for option in OPTIONS[group]]
)
def test_option_composes_and_brings_its_content(group: str, option: str) -> None:
    cfg = OmegaConf.to_container(compose(f"{group}={option}", "output_dir=x", "name=x"), resolve=True)
    if group in ("data", "model", "trainer"):
        content = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
        assert set(content.get(group, content)) - {"defaults"} <= set(cfg[group])
    if group in ("evals", "logger") and option != "records":
        assert cfg[group]
        assert all("_target_" in node for node in cfg[group].values())


def evaluates_all() -> DictConfig:
    return command.compose("evaluate", ["checkpoint=x"])


def test_every_file_is_an_option_or_known() -> None:
    others = {str(path) for path in FILES if path.parent.as_posix() not in GROUPS}
    commands = {"train", "evaluate", "caption", "search", "export", "demo", "plan"}
    engines = {"engine", *(f"engine/{name}" for name in ("local", "gpus", "slurm", "ray"))}  # see test_engines.py
    brought = {
        "small": compose("trainer=smoke").data.batch_size == 8,
        "skip_missing": evaluates_all().scoring.skip_missing,
        "roots": compose().roots.mscoco == evaluates_all().roots.mscoco == "data/mscoco",
        "scoring": compose().scoring.quick == 256 and evaluates_all().scoring.split == "test",
    }
    assert {name for name in others if not name.startswith("hydra/")} == {*commands, *engines, *brought}
    assert all(brought.values())


@pytest.mark.parametrize(
    ("experiment", "data"), [("pretrain_b32", "scenes"), *((name, "mscoco") for name in OPTIONS["experiment"])]
)
def test_experiment_on_other_data_is_scored_on_them(experiment: str, data: str) -> None:
    cfg = compose(f"experiment={experiment}", f"data={data}")
    prefix = "scenes" if data == "scenes" else "mscoco"
    assert f"{prefix}_retrieval" in cfg.evals
    assert {name.split("_")[0] for name in cfg.evals} <= {prefix, "compositional"}


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("evals=[mscoco_captions,nocaps_captions]", {"mscoco_captions", "nocaps_captions"}),
        ("evals=nocaps", {"nocaps_captions"}),
        ("evals=[]", set()),
    ],
)
def test_evaluations_can_be_listed(override: str, names: set[str]) -> None:
    assert set(compose("experiment=pretrain_b32", override).evals) == names


@pytest.mark.parametrize("data", [o for o in OPTIONS["data"] if o not in ("records", "scenes", "scenes_vqa", "laion")])
def test_evaluation_reads_the_folder_of_the_data(data: str) -> None:
    evals = compose(f"data={data}", "data.root=/elsewhere").evals
    assert {node.records.root for node in evals.values()} == {"/elsewhere"}


@pytest.mark.parametrize("evals", ["mscoco", "mscoco_captions", "flickr8k", "nocaps", "[nocaps_captions]"])
def test_evaluation_on_other_data_reads_the_folder_of_its_name(evals: str) -> None:
    nodes = compose("experiment=pretrain_b32", f"evals={evals}", "data_dir=/all").evals.values()
    assert nodes
    assert {node.records.root for node in nodes} == {f"/all/{node.name}" for node in nodes}


@pytest.mark.parametrize(
    ("overrides", "root"),
    [
        (("experiment=finetune_mscoco_keep", "data.root=/x", "evals=[mscoco_retrieval]"), "/x"),
        (("data=flickr8k", "data.root=/x", "evals=mscoco"), "data/mscoco"),
        (("data=flickr8k", "data.root=/x", "evals=flickr30k"), "data/flickr30k"),
        (("data=flickr30k", "data.root=/x", "evals=[flickr30k_captions]"), "/x"),
        (("experiment=pretrain_b32", "roots.mscoco=/x"), "/x"),
    ],
)
def test_one_rule_for_where_data_are(overrides: tuple[str, ...], root: str) -> None:
    """`data.root` locates the training data, also for evaluations on the same data; `roots` locates all others."""
    nodes = compose(*overrides).evals.values()
    assert nodes
    assert {node.records.root for node in nodes} == {root}
    for name in ("mscoco_captions", "mscoco_retrieval"):
        assert command.compose("evaluate", ["checkpoint=x", "roots.mscoco=/x"]).evals[name].records.root == "/x"


@pytest.mark.parametrize("data", OPTIONS["data"])
def test_data_builds(data: str) -> None:
    function = ["data.records._target_=coca_lit.data.scenes.render.scene_records"] if data == "records" else []
    assert build(compose(f"data={data}", *function).data, "data", tokenizer=None).batch_size > 0


@pytest.mark.parametrize("trainer", ["auto", "cpu", "smoke"])
def test_trainer_builds(trainer: str, tmp_path: Path) -> None:
    made = build_trainer(compose(f"trainer={trainer}", f"output_dir={tmp_path}", "ema=0.9"), [])
    assert [type(callback).__name__ for callback in made.callbacks[:2]] == ["Checkpoints", "Averaging"]


def test_weights_of_the_losses_reach_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    module = build_module(compose(*TINY, "experiment=finetune_mscoco", "model.caption_weight=0.5"))
    assert isinstance(module, CoCaLit)
    assert module.pairs.weights == {"contrastive": 0, "caption": 0.5}
    assert "frozen, no loss with a weight above 0 trains them: image_projection, " in capsys.readouterr().out


# Mistakes


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`refused(*arguments)`: what a user is told about a command line that cannot run."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["coca-plan", *arguments])
        with pytest.raises(SystemExit) as exit:
            command.command("plan", lambda cfg: None)
        return str(exit.value.code).removeprefix("error: ")

    return call


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.optimizer.lrr=1", "there is no key 'model.optimizer.lrr'; did you mean 'model.optimizer.lr'?"),
        ("modle.optimizer.lr=1", "there is no key 'modle.optimizer.lr'; did you mean 'model.optimizer.lr'?"),
        ("lr=1e-4", "there is no key 'lr'; did you mean 'model.optimizer.lr'?"),
        ("max_epoch=1", "there is no key 'max_epoch'; did you mean 'trainer.max_epochs'?"),
        ("sede=1", "there is no key 'sede'; did you mean 'seed'?"),
        (
            "trainer.val_chek_interval=1",
            "there is no key 'trainer.val_chek_interval'; did you mean 'trainer.val_check_interval'?",
        ),
        ("label_smoothing=0.1", "there is no key 'label_smoothing'; did you mean 'model.label_smoothing'?"),
        ("dta=laion", "there is no key 'dta'; did you mean 'data'?"),
        ("experiments=demo", "there is no key 'experiments'; did you mean 'experiment'?"),
        ("objective=scenes/CIDEr", "there is no key 'objective'; did you mean 'scoring.objective'?"),
        ("image_weights=x.pt", "there is no key 'image_weights'; did you mean 'init_parts.image_encoder'?"),
        ("model.contrastive=siglip", "there is no key 'model.contrastive'; did you mean 'model.net.contrastive'?"),
        ("+image_weights=x.pt", "there is no key 'image_weights'; did you mean 'init_parts.image_encoder'?"),
        ("xyzzy=1", "there is no key 'xyzzy'."),
        ("+xyzzy=1", "there is no key 'xyzzy'."),
        ("~xyzzy", "Could not delete from config. 'xyzzy' does not exist."),
        ("seed=abc", "seed must be a whole number, the default is 0; got abc"),
        ("seed=1.5", "seed must be a whole number, the default is 0; got 1.5"),
        ("scoring.skip_missing=no", "scoring.skip_missing must be true or false, the default is false; got 'no'"),
        ("imports=my_package", "imports must be a list, the default is []; got my_package"),
        (
            "trainer=smok",
            "'trainer' has no option 'smok'; did you mean 'smoke'? The options: auto, cpu, ddp, fsdp, smoke",
        ),
        ("model=cocoa", "'model' has no option 'cocoa'; did you mean 'coca'? The options: coca, coca_answers"),
        *(
            (f"{key}=null", f"{key} must be the name of an option or a list of names, got null: {key}=[] chooses none")
            for key in ("evals", "experiment", "logger", "callbacks")
        ),
        ("logger=zzz", "'logger' has no option 'zzz'. The options: csv, mlflow, tensorboard, wandb"),
    ],
)
def test_wrong_override_is_one_sentence(refused: Callable[..., str], override: str, said: str) -> None:
    assert refused(override) == said


def test_an_argument_that_no_file_lists_is_not_blamed_for_a_typo_beside_it(refused: Callable[..., str]) -> None:
    said = refused("data.train_count=64", "image_sze=32")
    assert said == "there is no key 'image_sze'; did you mean 'image_size'?"


# Arguments that no file lists


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("trainer.val_check_interval=0.5", 0.5),
        ("model.label_smoothing=0.1", 0.1),
        ("model.net.pooler=cascade", "cascade"),
        ("model.net.image_encoder_args.patch_drop_rate=0.5", 0.5),
        ("model.optimizer.betas=[0.9,0.95]", [0.9, 0.95]),
        ("model.objectives.mine._target_=my_parts.Mine", "my_parts.Mine"),
        ("data.cached_augmentations=4", 4),
        ("callbacks.checkpoint.best=scenes/CIDEr", "scenes/CIDEr"),
        ("evals.scenes_captions.records.count=3", 3),
        ("lora.alpha=8", 8),
    ],
)
def test_argument_of_a_constructor_needs_no_entry_in_a_file(override: str, value: Any) -> None:
    assert OmegaConf.select(compose(override), override.partition("=")[0]) == value


def test_argument_that_only_another_option_lists() -> None:
    """The file of `data=scenes`, the default, lists `cache_dir`; that of `data=laion` leaves it to the constructor."""
    assert compose("data=laion", "data.cache_dir=/x").data.cache_dir == "/x"


def test_arguments_of_the_target_that_is_named_beside_them() -> None:
    words = ("data=records", "data.records._target_=coca_lit.data.datasets.coco.coco_folder_records")
    cfg = compose(*words, "data.records.annotations=val.json", "data.val_split=null")
    assert (cfg.data.records.annotations, cfg.data.val_split) == ("val.json", None)


# Mistakes that the config alone shows


CHEAP = [
    (("model.optimizer.lr=abc",), r"model\.optimizer\.lr must be a number of at least 0, the default is .*; got abc"),
    (("data.batch_size=-3",), r"data\.batch_size must be a number of at least 0, the default is 64; got -3"),
    (("data.num_workers=true",), r"data\.num_workers must be a number of at least 0, the default is 0; got true"),
    (
        ("evals=[scenes_captions]", "scoring.skip_missing=maybe"),
        r"scoring\.skip_missing must be true or false, .* maybe",
    ),
    (("trainer.max_epochs=many",), r"trainer\.max_epochs must be a number, the default is 6; got many"),
    (("experiment=finetune_mscoco", "data.batch_size=big", "data.root=."), r"data\.batch_size .* is 128; got big"),
    (("init_from=/nowhere.pt",), r"init_from: there is no checkpoint '/nowhere\.pt'"),
    (("init_parts.image_encoder=/nowhere.pt",), r"init_parts\.image_encoder: there is no checkpoint"),
    (("ckpt_path=/nowhere.ckpt",), r"ckpt_path: there is no checkpoint"),
    (("scoring.clip_score_model=/nowhere.pt",), r"scoring\.clip_score_model: there is no checkpoint"),
    (
        ("experiment=finetune_mscoco", "data.root=/nowhere", "evals=[mscoco_retrieval]"),
        r"data\.root: there is no folder '/nowhere' \(what belongs there: .*README\.md\); set data\.root=PLACE ",
    ),
    (("experiment=pretrain_b32", "data.shards=/nowhere/{00..12}.tar"), r"data\.shards: there is no folder '/nowhere'"),
    (("experiment=pretrain_b32", "data.shards={a: /nowhere/a}"), r"data\.shards: there is no folder '/nowhere/a'"),
    (
        ("evals=mscoco", "data_dir=/nowhere"),
        r"roots\.mscoco: there is no folder '/nowhere/mscoco' .*; set roots\.mscoco=.*; scoring\.skip_missing=true",
    ),
    (
        ("evals=[folder_captions]", "evals.folder_captions.records.root=/nowhere"),
        r"evals\.folder_captions\.records\.root: ",
    ),
]


@pytest.mark.parametrize(("overrides", "said"), CHEAP)
def test_cheap_mistakes_are_found_in_the_config(overrides: tuple[str, ...], said: str) -> None:
    words = list(map(to_override, overrides))
    with pytest.raises(UserError, match=f"^{said}") as caught:
        command._start(lambda cfg: None, compose(*words), command._defaults("train", words))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ("scoring.every_n_epochs=null", "scoring.every_n_steps=100"),
        ("trainer=cpu", "trainer.devices=auto"),
        ("trainer=cpu", "trainer.devices=[0,1]"),
    ],
)
def test_what_is_no_number_is_accepted_where_it_has_a_meaning(words: tuple[str, ...]) -> None:
    assert command._start(lambda cfg: True, compose(*words), command._defaults("train", list(words)))


@pytest.mark.slow
def test_cheap_mistakes_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    program = f"""
import sys
from coca_lit.cli.train import train
for words in {[overrides for overrides, _ in CHEAP[::4]]!r}:
    sys.argv = ["train.py", *words]
    try:
        train()
    except SystemExit as error:
        assert str(error).startswith("error: "), error
    else:
        sys.exit(f"accepted: {{words}}")
sys.exit("torch" in sys.modules or "lightning" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "overrides",
    [
        (
            "trainer.max_steps=-1",
            "callbacks.checkpoint.every_minutes=0.5",
            "lora.alpha=0.5",
            "trainer.gradient_clip_val=null",
        ),
        ("init_parts.image_encoder=efficientnet_lite0", "data.text=null", "trainer.devices=2", "trainer.max_epochs=-1"),
        ("experiment=pretrain_b32", "data.shards=s3://bucket/{0..3}.tar", "evals=[]"),
        (
            "experiment=pretrain_b32",
            "data.shards=./{0..3}.tar",
            "evals=[mscoco_retrieval]",
            "scoring.skip_missing=true",
        ),
    ],
)
def test_what_the_constructors_take_is_let_through(overrides: tuple[str, ...]) -> None:
    words = list(map(to_override, overrides))
    assert command._start(lambda cfg: "started", compose(*words), command._defaults("train", words)) == "started"


def test_a_plan_needs_no_files() -> None:
    words = ["init_from=/nowhere.pt", "experiment=pretrain_b32"]
    cfg = command.compose("plan", words)
    assert command._start(lambda cfg: "started", cfg, command._defaults("plan", words)) == "started"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("outputs/x", r"the run cannot be started: .*outputs"),
        ("/proc/nowhere/x", r"the run cannot be started: .*/proc/nowhere"),
    ],
)
def test_outputs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").touch()
    monkeypatch.setattr("sys.argv", ["train.py", f"hydra.run.dir={place}"])
    with pytest.raises(SystemExit, match=f"^error: {said}"):
        command.command("train", lambda cfg: None, multirun=True)


@pytest.mark.parametrize("evals", ["mscoco_caption", "[mscoco_caption]", "[scenes,mscoco_caption]"])
def test_wrong_evaluation_is_found_in_lists_too(refused: Callable[..., str], evals: str) -> None:
    said = refused(f"evals={evals}")
    assert said.startswith("'evals' has no option 'mscoco_caption'; did you mean 'mscoco_captions'? The options: ")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"modle": {}}, "there is no key 'modle'; did you mean 'model'?"),
        ({"seed": "abc"}, "seed must be a whole number, the default is 0; got abc"),
        (
            {"defaults": [{"override /dta": "laion"}]},
            "In 'experiment/mine': Could not override 'dta'. No match in the defaults list; did you mean 'data'?",
        ),
        (
            {"defaults": [{"override /data": "ours"}], "data": {"root": "x"}},
            "'data' has no option 'ours'; did you mean 'our'? The options: flickr30k, flickr8k, laion, mscoco, nocaps, "
            "our, records, scenes, scenes_vqa, vqa",
        ),
    ],
)
@pytest.mark.parametrize("how", ["--config-dir", "hydra.searchpath"])
def test_mistake_in_an_experiment_file(
    refused: Callable[..., str], tmp_path: Path, content: dict[str, Any], said: str, how: str
) -> None:
    """In a user's folder, whose options are suggested too."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(content)}")
    (tmp_path / "data" / "our.yaml").write_text("defaults: [scenes]\n")
    where = ("--config-dir", str(tmp_path)) if how == "--config-dir" else (f"{how}=[file://{tmp_path}]",)
    assert refused("experiment=mine", *where) == said
    assert refused("experiment=min", *where).startswith("'experiment' has no option 'min'; did you mean 'mine'?")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+model.contrastive=siglip", r"^model has no key 'contrastive'; did you mean 'model\.net\.contrastive'\?"),
        ("+model.warmup_stepz=1", r"^model has no key 'warmup_stepz'; did you mean 'warmup_steps'\? Its keys: net, "),
        ("+model.optimizer.lrate=1", r"^model\.optimizer has no key 'lrate'.* Its keys: lr, betas"),
        ("+model.net.poler=cascade", r"^model: CoCa has no argument 'poler'; did you mean 'pooler'\?"),
        ("model.net.name=coca_vit_b23", r"^model: unknown model 'coca_vit_b23'; did you mean 'coca_vit_b32'\?"),
        ("+model.net.pooler=triple", r"^model: pooler must be 'single' or .* or 'mean_all', got 'triple'"),
        ("model.net.cls_mask=wrong", r"^model: .*legacy"),
        ("model.contrastive_weight=-1", r"^model\.contrastive_weight must be a number of at least 0, .* got -1"),
        ("model.caption_weight=much", r"^model\.caption_weight must be a number of at least 0, .* got much"),
        ("+model.compile=maybe", r"^model\.compile must be true or false, the default is false; got maybe"),
        ("model.freeze=[image_encodr]", r"^model: nothing in the model is called image_encodr; parts .*image_encoder"),
        ("model.freeze=image_encodr", r"^model: nothing in the model is called image_encodr; parts .*image_encoder"),
        ("model.optimizer.lr=abc", r"^model\.optimizer: lr must be a number of at least 0, got 'abc'"),
        ("+lora.rnk=8", r"^lora has no key 'rnk'; did you mean 'rank'\? Its keys: net, rank, alpha, parts"),
        ("init_parts.image_encoder=/dev/null/x", r"^init_parts\.image_encoder: |there is no checkpoint"),
    ],
)
def test_wrong_model_is_one_sentence(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build_module(compose(*TINY, override))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ema=2", r"^ema: decay must be a number of at least 0 and at most 1, got 2"),
        ("ema=abc", r"^ema: decay must be a number of at least 0 and at most 1, got 'abc'"),
        (
            "trainer.accumulate_grad_batches=0",
            r"^trainer: accumulate_grad_batches must be a whole number of at least 1",
        ),
        (
            "callbacks.checkpoint.every_n_steps=abc",
            r"^callbacks\.checkpoint: every_n_steps must be a whole number .*'abc",
        ),
        (
            "callbacks.checkpoint.every_n_steps=0.5",
            r"^callbacks\.checkpoint: every_n_steps must be a whole number .*0\.5",
        ),
        ("callbacks.checkpoint.every_minutes=0", r"^callbacks\.checkpoint: every_minutes must be a number above 0"),
        ("trainer.precision=half", r"^trainer: Precision 'half' is invalid"),
        ("+trainer.max_epoch=1", r"^trainer has no key 'max_epoch'; did you mean 'max_epochs'\?"),
        ("+callbacks.throughput.every=1", r"^callbacks\.throughput has no key 'every'"),
        ("+logger.csv.dir=x", r"^logger\.csv has no key 'dir'"),
        ("callbacks.checkpoint.keep_last=0", r"^callbacks\.checkpoint: keep_last must be a whole number of at least 1"),
        ("callbacks.checkpoint._target_=ModelCheckpoint", r"^callbacks\.checkpoint: there is no 'ModelCheckpoint' \("),
        ("trainer.accelerator=mps", r"^trainer: .*MPS"),
        pytest.param(
            "trainer.accelerator=gpu",
            r"^trainer: .*(?i:gpu|cuda)",
            marks=pytest.mark.skipif("torch.cuda.is_available()"),
        ),
        ("callbacks.progress._target_=coca_lit.callbacks.Bar", r"^callbacks\.progress: there is no 'coca_lit\.callb"),
    ],
)
def test_wrong_trainer_is_one_sentence(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build_trainer(compose("trainer=cpu", f"output_dir={tmp_path}", override), [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("nothing", ["logger=[]", "logger.csv=null"])
def test_without_a_logger_nothing_monitors_the_learning_rate(nothing: str, tmp_path: Path) -> None:
    """Lightning's monitor refuses to train without a logger."""
    trainer = build_trainer(compose("trainer=cpu", f"output_dir={tmp_path}", nothing), [])
    assert not any(isinstance(callback, LearningRateMonitor) for callback in trainer.callbacks)


def test_weights_of_another_model_are_blamed_on_their_key(tmp_path: Path) -> None:
    torch.save({"conv1.0.weight": torch.zeros(1)}, tmp_path / "other.pt")
    for key in ("init_from", "init_parts.image_encoder"):
        with pytest.raises(ConfigError, match=rf"^{key}: ") as caught:
            build_module(compose(*TINY, f"{key}={tmp_path / 'other.pt'}"))
        assert "\n" not in str(caught.value)


def test_errors_that_are_no_mistake_of_the_user_pass() -> None:
    with pytest.raises(ZeroDivisionError), error_context("model"):
        _ = 1 / 0


# A user's code


class Shared(TypedDict, total=False):
    size: int


class More(Shared, total=False):
    workers: int


class Strict:
    def __init__(self, batch: int, **shared: Unpack[More]) -> None:
        self.arguments = {"batch": batch, **shared}


class Quoted:
    def __init__(self, batch: int, **shared: "Unpack[More]") -> None:
        self.arguments = {"batch": batch, **shared}


class Free:
    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


def node(target: Any, **keys: Any) -> DictConfig:
    return OmegaConf.create({"_target_": f"{__name__}.{target.__name__}", **keys})


@pytest.mark.parametrize("target", [Strict, Quoted])
def test_shared_arguments_of_a_typed_dictionary_are_known(target: type) -> None:
    assert build(node(target, batch=2, size=3, workers=1), "data").arguments == {"batch": 2, "size": 3, "workers": 1}
    with pytest.raises(
        ConfigError, match=r"^data has no key 'worker'; did you mean 'workers'\? Its keys: batch, size, w"
    ):
        build(node(target, batch=2, worker=1), "data")


def test_other_keyword_arguments_are_not_checked() -> None:
    assert build(node(Free, anything=[1]), "data").arguments == {"anything": [1]}


def test_objects_are_offered_to_those_who_take_them() -> None:
    assert build(node(Strict, batch=1), "data", {"tokenizer": 1, "size": 2}).arguments == {"batch": 1, "size": 2}
    assert build(node(Strict, batch=1, size=3), "data", {"size": 2}).arguments == {"batch": 1, "size": 3}
    with pytest.raises(ConfigError, match=r"^data has no key 'tokenizer'"):
        build(node(Strict, batch=1), "data", tokenizer=1)


@pytest.mark.parametrize("target", ["pathlib.Path", "torch.optim.SGD", "lightning.pytorch.loggers.CSVLogger"])
def test_any_class_can_be_named(target: str) -> None:
    assert resolve_target(target, "x").__name__ == target.rpartition(".")[2]


@pytest.mark.parametrize(
    "target", ["", "print", "torch.optim", "coca_lit.models.create_modle", "no_such_module.run", 3]
)
def test_what_is_no_class_cannot_be_built(target: Any) -> None:
    with pytest.raises(ConfigError, match=r"^model\.net: "):
        resolve_target(target, "model.net")


def test_a_node_without_a_target() -> None:
    with pytest.raises(
        ConfigError, match=r"^data names nothing to build: set data\._target_ to a class or a function$"
    ):
        build(OmegaConf.create({"root": "x"}), "data")


GUEST = """
import lightning.pytorch as L
from coca_lit.data.datamodule import ScenesDataModule

class MyData(ScenesDataModule):
    def __init__(self, colour: str, **shared):
        super().__init__(**shared)
        print("data:", colour)

class MyCallback(L.Callback):
    def on_fit_end(self, trainer, pl_module):
        print("callback: step", trainer.global_step)
"""


@pytest.mark.slow
def test_a_users_folder(tmp_path: Path) -> None:
    """A module, an experiment and a config group outside any package, in the folder that a command is started from."""
    (tmp_path / "my_module.py").write_text(GUEST)
    (tmp_path / "my_names.py").write_text("print('imported')\n")
    for folder, name, content in (
        ("data", "mine", {"defaults": ["scenes"], "_target_": "my_module.MyData", "colour": "green"}),
        ("experiment", "mine", {"defaults": [{"override /data": "mine"}, {"override /evals": []}], "name": "mine"}),
    ):
        (tmp_path / "conf" / folder).mkdir(parents=True)
        header = "# @package _global_\n" if folder == "experiment" else ""
        (tmp_path / "conf" / folder / f"{name}.yaml").write_text(header + yaml.safe_dump(content))
    callback = "+callbacks.mine={_target_: my_module.MyCallback}"
    words = ("--config-dir", "conf", "experiment=mine", "imports=[my_names]", callback, *TINY)
    done = train_py(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in ("imported", "data: green", "callback: step 2") if line not in done.stdout] == []

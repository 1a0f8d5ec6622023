"""Every config composes and builds; a mistake in one is a sentence that says what was meant; strangers run no code."""

import itertools
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from running import TINY, compose

from coca_lit.cli.assembly import build_module, build_trainer
from coca_lit.cli.command import CONF
from coca_lit.cli.config import TrainConfig, build, check_hydra, explain_override, resolve_target
from coca_lit.errors import ConfigError, error_context
from coca_lit.lit_module import CoCaLit

FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
GROUPS = ("callbacks", "data", "evals", "experiment", "logger", "model", "trainer")
OPTIONS = {group: [path.name for path in FILES if path.parent == Path(group)] for group in GROUPS}
NODE = {"_target_": "coca_lit.models.create_model", "name": "coca_tiny"}


@pytest.mark.parametrize("experiment", OPTIONS["experiment"])
def test_experiment_takes_the_advertised_overrides(experiment: str) -> None:
    weights = ("model.contrastive_weight=0.5", "model.caption_weight=3", "model.optimizer.lr=0.25")
    cfg = compose(f"experiment={experiment}", *weights, "output_dir=x", "name=x")
    values = (cfg.model.contrastive_weight, cfg.model.caption_weight, cfg.model.optimizer.lr)
    assert values == (0.5, 3, 0.25)
    assert set(cfg) == {field.name for field in fields(TrainConfig)}
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in GROUPS for option in OPTIONS[group]])
def test_option_composes_and_brings_its_content(group: str, option: str) -> None:
    cfg = OmegaConf.to_container(compose(f"{group}={option}", "output_dir=x", "name=x"), resolve=True)
    if group in ("data", "model", "trainer"):
        assert set(yaml.safe_load((CONF / group / f"{option}.yaml").read_text())) - {"defaults"} <= set(cfg[group])
    if group in ("evals", "logger"):
        assert cfg[group]
        assert all("_target_" in node for node in cfg[group].values())


def evaluates_all() -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("evaluate", ["checkpoint=x"])


def test_every_file_is_an_option_or_known() -> None:
    others = {str(path) for path in FILES if path.parent.as_posix() not in GROUPS}
    commands = {"train", "evaluate", "caption", "search", "export", "demo"}  # the commands
    brought = {
        "small": compose("trainer=smoke").data.batch_size == 8,
        "skip_missing": evaluates_all().skip_missing,
        "scoring": compose().scoring.quick == 256 and evaluates_all().scoring.split == "test",
    }
    assert {name for name in others if not name.startswith("hydra/")} == {*commands, *brought}
    assert all(brought.values())


@pytest.mark.parametrize(("experiment", "data"), [*itertools.product(OPTIONS["experiment"], ["scenes", "mscoco"])])
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


@pytest.mark.parametrize("data", [o for o in OPTIONS["data"] if o not in ("scenes", "scenes_vqa", "laion")])
def test_evaluation_reads_the_folder_of_the_data(data: str) -> None:
    evals = compose(f"data={data}", "data.root=/elsewhere").evals
    assert {node.records.root for node in evals.values()} == {"/elsewhere"}


@pytest.mark.parametrize("evals", ["mscoco", "mscoco_captions", "flickr8k", "nocaps", "[nocaps_captions]"])
def test_evaluation_on_other_data_reads_the_folder_of_its_name(evals: str) -> None:
    nodes = compose("experiment=pretrain_b32", f"evals={evals}", "data_dir=/all").evals.values()
    assert nodes
    assert {node.records.root for node in nodes} == {f"/all/{node.name}" for node in nodes}


@pytest.mark.parametrize("data", OPTIONS["data"])
def test_data_builds(data: str) -> None:
    assert build(compose(f"data={data}").data, "data", tokenizer=None).batch_size > 0


@pytest.mark.parametrize("trainer", ["auto", "cpu", "smoke"])
def test_trainer_builds(trainer: str, tmp_path: Path) -> None:
    made = build_trainer(compose(f"trainer={trainer}", f"output_dir={tmp_path}", "ema=0.9"), [])
    assert [type(callback).__name__ for callback in made.callbacks[:2]] == ["Checkpoints", "Averaging"]


def test_weights_of_the_losses_reach_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    module = build_module(compose(*TINY, "experiment=finetune_mscoco", "model.caption_weight=0.5"))
    assert isinstance(module, CoCaLit)
    assert module.weights == {"contrastive": 0, "caption": 0.5}
    assert "frozen, no loss with a weight above 0 trains them: image_projection, " in capsys.readouterr().out


# Mistakes


def refused(*overrides: str, conf: Path = CONF) -> str:
    """What a user is told about a command line that does not compose."""
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        options = GlobalHydra.instance().config_loader().get_group_options
        with pytest.raises(HydraException) as caught:
            hydra.compose("train", list(overrides))
        return explain_override(caught.value, lambda: hydra.compose("train"), options)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.optimizer.lrr=1", "there is no key 'model.optimizer.lrr'; did you mean 'model.optimizer.lr'?"),
        ("modle.optimizer.lr=1", "there is no key 'modle.optimizer.lr'; did you mean 'model.optimizer.lr'?"),
        ("sede=1", "there is no key 'sede'; did you mean 'seed'?"),
        ("dta=laion", "there is no key 'dta'; did you mean 'data'?"),
        ("xyzzy=1", "there is no key 'xyzzy'."),
        ("seed=abc", "seed=abc: Value 'abc' of type 'str' could not be converted to Integer"),
        (
            "trainer=smok",
            "'trainer' has no option 'smok'; did you mean 'smoke'? The options: auto, cpu, ddp, fsdp, smoke",
        ),
        ("model=cocoa", "'model' has no option 'cocoa'; did you mean 'coca'? The options: coca, coca_answers"),
        ("logger=zzz", "'logger' has no option 'zzz'. The options: csv, tensorboard, wandb"),
    ],
)
def test_wrong_override_is_one_sentence(override: str, said: str) -> None:
    assert refused(override) == said


@pytest.mark.parametrize("evals", ["mscoco_caption", "[mscoco_caption]", "[scenes,mscoco_caption]"])
def test_wrong_evaluation_is_found_in_lists_too(evals: str) -> None:
    said = refused(f"evals={evals}")
    assert said.startswith("'evals' has no option 'mscoco_caption'; did you mean 'mscoco_captions'? The options: ")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"modle": {}}, "in 'experiment/mine': there is no key 'modle'; did you mean 'model'?"),
        ({"seed": "abc"}, "in 'experiment/mine': seed: Value 'abc' of type 'str' could not be converted to Integer"),
        ({"defaults": [{"override /dta": "laion"}]}, "there is no key 'dta'; did you mean 'data'?"),
    ],
)
def test_mistake_in_an_experiment_file(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    for path in CONF.rglob("*.yaml"):
        copy = tmp_path / path.relative_to(CONF)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(content)}")
    assert refused("experiment=mine", conf=tmp_path) == said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+model.warmup_stepz=1", r"^model has no key 'warmup_stepz'; did you mean 'warmup_steps'\? Its keys: net, "),
        ("+model.optimizer.lrate=1", r"^model\.optimizer has no key 'lrate'.* Its keys: module, lr, betas"),
        ("+model.net.poler=cascade", r"^model: CoCa has no argument 'poler', did you mean 'pooler'\?"),
        ("model.net.name=coca_vit_b23", r"^model: unknown model 'coca_vit_b23', did you mean 'coca_vit_b32'\?"),
        ("+model.net.pooler=triple", r"^model: pooler must be 'single', 'parallel' or 'cascade', got 'triple'"),
        ("model.net.cls_mask=wrong", r"^model: .*legacy"),
        ("model.contrastive_weight=-1", r"^model: contrastive_weight must be a number of at least 0, got -1"),
        ("model.caption_weight=much", r"^model: caption_weight must be a number of at least 0, got 'much'"),
        ("model.freeze=[image_encodr]", r"^model: nothing in the model is called image_encodr; parts .*image_encoder"),
        ("model.optimizer.lr=abc", r"^model\.optimizer: lr must be a number of at least 0, got 'abc'"),
        ("image_weights=/dev/null/x", r"^image_weights: |there is no checkpoint"),
    ],
)
def test_wrong_model_is_one_sentence(override: str, said: str) -> None:
    with pytest.raises((ConfigError, FileNotFoundError), match=said) as caught:
        build_module(compose(*TINY, override))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ema=2", r"^ema: .*\[0,1\]"),
        ("trainer.precision=half", r"^trainer: Precision 'half' is invalid"),
        ("+trainer.max_epoch=1", r"^trainer has no key 'max_epoch'; did you mean 'max_epochs'\?"),
        ("+callbacks.throughput.every=1", r"^callbacks\.throughput has no key 'every'"),
        ("+logger.csv.dir=x", r"^logger\.csv has no key 'dir'"),
        ("callbacks.checkpoint.keep_last=0", r"^callbacks\.checkpoint: keep_last must be at least 1, got 0"),
        ("callbacks.checkpoint._target_=ModelCheckpoint", r"^callbacks\.checkpoint: 'ModelCheckpoint' is outside the"),
        ("callbacks.progress._target_=coca_lit.callbacks.Bar", r"^callbacks\.progress: there is no 'coca_lit\.callb"),
    ],
)
def test_wrong_trainer_is_one_sentence(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build_trainer(compose("trainer=cpu", f"output_dir={tmp_path}", override), [])
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_blamed_on_their_key(tmp_path: Path) -> None:
    torch.save({"conv1.0.weight": torch.zeros(1)}, tmp_path / "other.pt")
    for key in ("init_from", "image_weights"):
        with pytest.raises(ConfigError, match=rf"^{key}: ") as caught:
            build_module(compose(*TINY, f"{key}={tmp_path / 'other.pt'}"))
        assert "\n" not in str(caught.value)


def test_errors_that_are_no_mistake_of_the_user_pass() -> None:
    with pytest.raises(ZeroDivisionError), error_context("model"):
        _ = 1 / 0


# Strangers


@pytest.mark.parametrize(
    "target",
    [
        "coca_lit.lit_module.CoCaLit",
        "coca_lit.models.create_model",
        "coca_lit.evals.captions.CaptionScores",
        "lightning.pytorch.trainer.Trainer",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.profilers.SimpleProfiler",
        "lightning.pytorch.strategies.FSDPStrategy",
        "torch.optim.AdamW",
        "torch.optim.SGD",
        "torch.optim.lr_scheduler.CosineAnnealingLR",
    ],
)
def test_target_passes(target: str) -> None:
    assert callable(resolve_target(target, "x"))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.open",
        "builtins.eval",
        "subprocess.run",
        "pickle.loads",
        "torch.load",
        "torch.hub.load",
        "torch.jit.load",
        "torch.utils.data.DataLoader",
        "webdataset.WebDataset",
        "hydra.utils.instantiate",
        "importlib.import_module",
        "timm.models.load_state_dict",  # weights_only=False would make it unpickle
        "lightning.pytorch.core.saving._load_from_checkpoint",  # the same
        "torch.optim.lr_scheduler.os.system",
        "torch.optim.lr_scheduler.partial",  # a real name there, whose home is functools
        "torch.optim.lr_scheduler.warnings.warn",
        "coca_lit.cli.config.importlib.import_module",
        "coca_lit.cli.config.field",
        "coca_lit.cli.sweep.OmegaConf",
        "coca_lit.metrics.java.meteor.subprocess",
        "coca_lit.metrics.java.meteor.subprocess.Popen",
        "coca_lit.weights.load.load_file",
        "coca_lit.weights.load.MODEL_KEY",
        "coca_lit_evil.run",
        "coca_lit",
        "torch.optim",
        "",
    ],
)
def test_target_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.net: "):
        resolve_target(target, "model.net")


@pytest.mark.parametrize(
    "node",
    [
        {"callbacks": {"x": {"_target_": "subprocess.run", "args": ["true"]}}},
        {"callbacks": {"x": {"_target_": "hydra_plugins.os.system", "command": "true"}}},
        {"callbacks": {"x": {"_target_": "${oc.env:HOME}"}}},
        {"launcher": {"_target_": "os.system"}},
        {"sweeper": {"params": [{"_target_": "os.system"}]}},
        {"job_logging": {"handlers": {"x": {"class": "logging.os.system", "command": "true"}}}},
        {"hydra_logging": {"formatters": {"x": {"()": "subprocess.run", "args": "true"}}}},
    ],
)
def test_what_hydra_would_run_is_refused(node: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^hydra\."):
        check_hydra(node)


def test_own_hydra_nodes_pass() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("train", return_hydra_config=True)
    check_hydra(OmegaConf.to_container(cfg.hydra, resolve=False))


def test_no_refused_target_runs_wherever_it_stands(tmp_path: Path) -> None:
    evil = {"_target_": "pathlib.Path.touch", "self": f"{tmp_path}/ran"}
    for node in (evil, {**NODE, "x": evil}, {**NODE, "x": [{"deep": evil}]}, {**NODE, "_args_": [evil]}):
        with pytest.raises(ConfigError, match="outside the packages"):
            build(OmegaConf.create(node), "model")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("key", ["_args_", "_recursive_", "self"])
def test_keys_of_hydra_itself_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"model has no key '{key}'"):
        build(OmegaConf.create({"_target_": "torch.optim.SGD", key: []}), "model")

"""Every config composes and builds; a mistake in one is a sentence that says what was meant."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict, Unpack

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig, OmegaConf

from coca_lit.cli import command
from coca_lit.cli.assembly import build, build_trainer
from coca_lit.cli.module import build_module
from coca_lit.cli.schema import argument_defaults, check
from coca_lit.cli.words import to_override
from coca_lit.errors import ConfigError
from coca_lit.lit_module import CoCaLit
from helpers.running import CONFIGS, ROOT, TINY, compose, train_py

GROUPS = ("callbacks", "data", "evals", "experiment", "logger", "model", "trainer")
OPTIONS = {
    group: sorted(path.stem for folder in CONFIGS for path in (folder / group).glob("[!_]*.yaml")) for group in GROUPS
}


def test_a_smoke_test_ends_after_two_steps_whatever_an_experiment_says(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    own = "# @package _global_\n# Mine.\ntrainer: {max_steps: 70, limit_train_batches: 1.0}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(own)
    words = (f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine", "output_dir=x", "name=x")
    assert compose(*words).trainer.max_steps == 70
    smoke = compose(*words, "trainer=smoke").trainer
    assert (smoke.max_steps, smoke.limit_train_batches) == (2, 2)
    assert compose(*words, "trainer=smoke", "trainer.max_steps=5").trainer.max_steps == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "data"), [("pretrain_b32", "scenes"), *((name, "mscoco") for name in OPTIONS["experiment"])]
)
def test_experiment_on_other_data_is_scored_on_them(experiment: str, data: str) -> None:
    cfg = compose(f"experiment={experiment}", f"data={data}")
    prefix = "scenes" if data == "scenes" else "mscoco"
    assert f"{prefix}_retrieval" in cfg.evals
    assert {name.split("_")[0] for name in cfg.evals} <= {prefix, "compositional"}


@pytest.mark.parametrize(
    ("overrides", "root"),
    [
        (("experiment=finetune_mscoco_keep", "data.root=/x", "evals=[mscoco_retrieval]"), "/x"),
        (("data=flickr8k", "data.root=/x", "evals=mscoco"), "data/mscoco"),
        (("data=flickr8k", "data.root=/x", "evals=flickr30k"), "data/flickr30k"),
        (("data=flickr30k", "data.root=/x", "evals=[flickr30k_captions]"), "/x"),
        (("experiment=pretrain_b32", "roots.mscoco=/x"), "/x"),
        (("experiment=pretrain_b32", "evals=[nocaps_captions]", "data_dir=/all"), "/all/nocaps"),
        (("data=nocaps", "data.root=/x"), "/x"),
    ],
)
def test_one_rule_for_where_data_are(overrides: tuple[str, ...], root: str) -> None:
    """`data.root` locates the training data, also for evaluations on the same data; `roots` locates all others."""
    nodes = compose(*overrides).evals.values()
    assert nodes
    assert {node.records.root for node in nodes} == {root}


def test_a_data_set_goes_with_the_evaluations_of_its_name() -> None:
    evals = command.compose("evaluate", ["checkpoint=x", "evals=mscoco", "roots.mscoco=/x"]).evals
    assert evals.keys() == {"mscoco_captions", "mscoco_retrieval"}
    assert {node.records.root for node in evals.values()} == {"/x"}
    assert command.compose("evaluate", ["checkpoint=x", "evals=nocaps"]).evals.keys() == {"nocaps_captions"}


def test_a_config_may_leave_its_target_to_the_user() -> None:
    assert command.compose("train", ["data=records"]).data.records._partial_


@pytest.mark.slow
@pytest.mark.parametrize("data", OPTIONS["data"])
def test_data_builds(data: str) -> None:
    function = ["data.records._target_=coca_lit.data.scenes.render.scene_records"] if data == "records" else []
    assert build(compose(f"data={data}", *function).data, "data", tokenizer=None).batch_size > 0


def test_weights_of_the_losses_reach_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    module = build_module(compose(*TINY, "experiment=finetune_mscoco", "init_from=null", "model.caption_weight=0.5"))
    assert isinstance(module, CoCaLit)
    assert module.loss_weights == {"contrastive": 0, "caption": 0.5}
    assert ": image_projection, " in capsys.readouterr().out


# Mistakes


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`refused(*arguments)`: what a user is told about a command line that cannot run."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["coca-plan", *arguments])
        with pytest.raises(SystemExit) as exit:
            command.command("plan", lambda cfg: None)
        assert "\n" not in str(exit.value.code)
        return str(exit.value.code).removeprefix("error: ")

    return call


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("model.optimizer.lrr=1", "model.optimizer.lr"),
        ("modle.optimizer.lr=1", "model.optimizer.lr"),
        ("max_epoch=1", "trainer.max_epochs"),
        ("dta=laion", "data"),
        ("roots.mscco=/x", "roots.mscoco"),
        ("evals.scenes_caption.every=2", "evals.scenes_captions.every"),
        ("+model.warmup_stepz=1", "model.warmup_steps"),
        ("lora.rnk=8", "lora.rank"),
        ("model.net.text_widht=96", "model.net.text_width"),
        ("model.nett.text_width=96", "model.net.text_width"),
        ("model.met=1", "model.net"),
        ("xyzzy=1", None),
    ],
)
def test_unknown_key_names_the_right_one(refused: Callable[..., str], override: str, meant: str | None) -> None:
    key = override.lstrip("+").partition("=")[0]
    hint = f"; did you mean '{meant}'?" if meant else "."
    assert refused(override) == f"there is no key '{key}'{hint}"


TOLD_SOON = {
    "kernels.enabld=true": "there is no key 'kernels.enabld'; did you mean 'kernels.enabled'?",
    "seed=abc": "seed must be a whole number, got abc",
    "trainer.callbacks=2": "trainer.callbacks cannot be set: set callbacks.NAME instead",
    "model.net.embed_dimm=3": "there is no key 'model.net.embed_dimm'; did you mean 'model.net.embed_dim'?",
}
TOLD_BY_TORCH = {"model.optimizer.lrr=1": "there is no key 'model.optimizer.lrr'; did you mean 'model.optimizer.lr'?"}


def test_a_mistake_is_told_before_what_it_does_not_need_is_imported() -> None:
    code = f"""
import sys
from coca_lit.cli.command import compose
for words in ({[*TOLD_SOON]!r}, {[*TOLD_BY_TORCH]!r}):
    for word in words:
        try:
            compose("train", [word])
        except Exception as error:
            print(error)
    print({{"torch", "timm", "lightning", "matplotlib"}} & sys.modules.keys() or "none")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    said = [*TOLD_SOON.values(), "none", *TOLD_BY_TORCH.values(), "{'torch'}"]
    assert done.stdout.splitlines() == said, done.stderr


@pytest.mark.parametrize(
    "override",
    [
        *("seed=abc", "seed=1.5", "seed=true", "scoring.skip_missing=no", "imports=my_package", "scoring.quick=many"),
        *("model.optimizer.lr=abc", "data.num_workers=true", "trainer.max_epochs=many", "model.compile=maybe"),
        *("callbacks.checkpoint.every_n_steps=abc", "callbacks.checkpoint.every_n_steps=0.5"),
        "model.net.text_width=abc",
    ],
)
def test_wrong_value_is_blamed_on_its_key(refused: Callable[..., str], override: str) -> None:
    key, _, value = override.partition("=")
    assert re.match(rf"{re.escape(key)} must be .*, got '?{value}'?$", refused(override))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("~xyzzy", "'xyzzy'"),
        ("trainer=smok", "'trainer'.*'smok'.*'smoke'"),
        ("evals=mscoco_caption", "'evals'.*'mscoco_captions'"),
        *((f"{key}=null", f"^{key} .*null.* {key}=\\[\\]") for key in ("evals", "experiment", "logger", "callbacks")),
        ("evals=", "^evals .*nothing.* evals=\\[\\]"),
    ],
)
def test_wrong_option_is_one_sentence(refused: Callable[..., str], override: str, said: str) -> None:
    assert re.search(said, refused(override))


def test_an_experiment_that_lies_in_its_group_is_told_where_it_belongs(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("defaults: [override /data: mscoco]\ndata: {batch_size: 2}\n")
    said = refused("--config-dir", str(tmp_path), "experiment=mine")
    assert said == "the first line of experiment/mine.yaml must be: # @package _global_"


def test_a_project_without_an_entry_point_is_named(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "projects" / "mine" / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "new_idea.yaml").touch()
    monkeypatch.setattr(command, "PACKAGE", tmp_path)
    said = refused("experiment=new_idea")
    assert said.startswith("'experiment' has no option 'new_idea': the folder ")
    assert f"{tmp_path}/projects/mine has it, but pyproject.toml has no entry point of that folder" in said


def test_a_file_of_the_name_of_an_option_without_one(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "mscoco.yaml").write_text("defaults: [mscoco_captions]\n")
    if version("hydra-core") < "1.4":
        said = refused("--config-dir", str(tmp_path), "evals=mscoco")
        assert said == "evals/mscoco.yaml has the name of an option of coca_lit: choose another"
    else:
        words = [f"hydra.searchpath=[file://{tmp_path}]", "checkpoint=x", "evals=mscoco"]
        assert command.compose("evaluate", words).evals.keys() == {"mscoco_captions"}


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("trainer.callbacks", "callbacks.NAME"),
        ("trainer.logger", "logger.NAME"),
        ("trainer.enable_checkpointing", "callbacks.checkpoint=null"),
        ("trainer.plugins", "trainer.precision"),
        ("model.micro_batch_size", "set trainer.micro_batch_size"),
        ("model.batch_schedule", "set data.batch_schedule"),
        ("trainer.overfit_batches", "set data.train_count"),
    ],
)
def test_a_key_that_would_be_ignored_names_the_right_one(refused: Callable[..., str], key: str, right: str) -> None:
    assert re.match(rf"{re.escape(key)} cannot be set: .*{re.escape(right)}", refused(f"{key}=2"))


def test_an_argument_that_no_file_lists_is_not_blamed_for_a_typo_beside_it(refused: Callable[..., str]) -> None:
    assert "'image_size'" in refused("data.train_count=64", "image_sze=32")


# Arguments that no file lists


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.label_smoothing=0.1", 0.1),
        ("model.net.image_encoder_args.patch_drop_rate=0.5", 0.5),
        ("model.objectives.mine._target_=my_parts.Mine", "my_parts.Mine"),
        ("callbacks.checkpoint.best=scenes/CIDEr", "scenes/CIDEr"),
        ("evals.scenes_captions.records.count=3", 3),
    ],
)
def test_argument_of_a_constructor_needs_no_entry_in_a_file(override: str, value: Any) -> None:
    assert OmegaConf.select(compose(override), override.partition("=")[0]) == value


def test_arguments_of_the_target_that_is_named_beside_them() -> None:
    words = ("data=records", "data.records._target_=coca_lit.data.datasets.captions.coco_folder_records")
    cfg = compose(*words, "data.records.annotations=val.json", "data.val_split=null")
    assert (cfg.data.records.annotations, cfg.data.val_split) == ("val.json", None)


# Mistakes that the config alone shows


MISTAKES = [  # and what the answer names
    ("typo=1", "typo"),
    ("model.net.contrastive=sigmoid", "model.net.contrastive .*softmax or siglip"),
    ("scoring.generate.num_beam=3", "scoring: .*num_beams"),
    ("scoring.generate.strategy=beem", "scoring: .*'beam'"),
    ("evals.mine=1", "evals.mine"),
    ("init_from=/nowhere.pt", "init_from: .*/nowhere.pt"),
    ("init_parts.image_encoder=/nowhere.pt", "init_parts.image_encoder: .*/nowhere.pt"),
    ("ckpt_path=/nowhere.ckpt", "ckpt_path: .*/nowhere.ckpt"),
]


@pytest.mark.slow
def test_mistakes_leave_nothing(tmp_path: Path) -> None:
    program = f"""
import re, sys
from coca_lit.cli import train_command
for word, said in {MISTAKES!r}:
    sys.argv = ["train.py", word]
    try:
        train_command()
    except SystemExit as error:
        assert re.match(f"error: .*{{said}}", str(error)), error
    else:
        sys.exit(f"accepted: {{word}}")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.max_steps=-1", "callbacks.checkpoint.every_minutes=0.5", "trainer.gradient_clip_val=null"),
        (
            "init_parts.image_encoder=efficientnet_lite0",
            "data.batch_schedule=null",
            "trainer.devices=2",
            "trainer.max_epochs=-1",
        ),
        ("experiment=pretrain_b32", "data.shards=s3://bucket/{0..3}.tar", "evals=[]", "data.epoch_samples=1e6"),
        ("scoring.every_n_epochs=null", "scoring.every_n_steps=100", "lora.alpha=0.5"),
        ("trainer=cpu", "trainer.devices=[0,1]", "trainer.max_time=00:01:00:00"),
        ("+callbacks.mine={_target_: my_module.MyCallback, anything: 3}",),
    ],
)
def test_what_the_constructors_take_is_let_through(overrides: tuple[str, ...]) -> None:
    compose(*map(to_override, overrides))


@pytest.mark.parametrize("place", ["outputs/x", "/proc/nowhere/x"])
def test_outputs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").touch()
    monkeypatch.setattr("sys.argv", ["train.py", f"hydra.run.dir={place}"])
    with pytest.raises(SystemExit, match=f"^error: .*{place.rpartition('/')[0]}"):
        command.job_command("train", lambda cfg: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "content", "said"),
    [
        ("--config-dir", {"modle": {}}, "'modle'.*'model'"),
        ("hydra.searchpath", {"seed": "abc"}, "seed .*abc"),
        ("--config-dir", {"defaults": [{"override /data": "our"}]}, r"data=our.*evals=\[\].*evals/our\.yaml"),
        ("--config-dir", {"defaults": [{"override /dta": "laion"}]}, "experiment/mine.*'dta'"),
        ("hydra.searchpath", {"defaults": [{"override /data": "ours"}]}, "'ours'.*'our'"),
    ],
)
def test_mistake_in_an_experiment_file(
    refused: Callable[..., str], tmp_path: Path, how: str, content: dict[str, Any], said: str
) -> None:
    """In a user's folder, whose options are suggested too."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(content)}")
    (tmp_path / "data" / "our.yaml").write_text("defaults: [scenes]\n")
    where = ("--config-dir", str(tmp_path)) if how == "--config-dir" else (f"{how}=[file://{tmp_path}]",)
    assert re.search(said, refused("experiment=mine", *where))
    assert re.search("'min'.*'mine'", refused("experiment=min", *where))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+model.net.poler=cascade", r"'model.net.poler'.*'model.net.pooler'"),
        ("+model.net.pooler=paralel", r"'paralel'.*parallel"),
        ("model.net.name=coca_vit_b23", r"^model: .*'coca_vit_b23'.*'coca_vit_b32'"),
        ("model.contrastive_weight=-1", r"^model: contrastive.*-1"),
        ("model.freeze=[image_encodr]", r"^model: .*image_encodr.*image_encoder"),
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
        ("ema=2", r"^ema: decay .*2"),
        ("callbacks.checkpoint.every_n_steps=0.5", r"^callbacks\.checkpoint.every_n_steps .*0\.5"),
        ("trainer.precision=half", r"^trainer: .*'half'"),
        ("callbacks.checkpoint._target_=ModelCheckpoint", r"^callbacks\.checkpoint: .*'ModelCheckpoint'"),
        ("trainer.accelerator=mps", r"^trainer: .*MPS"),
        pytest.param(
            "trainer.accelerator=gpu",
            r"^trainer: .*(?i:gpu|cuda)",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ("callbacks.progress._target_=coca_lit.callbacks.Bar", r"^callbacks\.progress: .*'coca_lit\.callbacks\.Bar'"),
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


class Inherits(Strict):
    pass


def node(target: Any, **keys: Any) -> DictConfig:
    return OmegaConf.create({"_target_": f"{__name__}.{target.__name__}", **keys})


def problem_of(**nodes: DictConfig) -> None:
    check({key: OmegaConf.to_container(value) for key, value in nodes.items()}, dict.fromkeys(nodes))


@pytest.mark.parametrize("target", [Quoted, Inherits])
def test_shared_arguments_of_a_typed_dictionary_are_known(target: type) -> None:
    made = node(target, batch=2, size=3, workers=1)
    problem_of(data=made)
    assert build(made, "data").arguments == {"batch": 2, "size": 3, "workers": 1}
    with pytest.raises(ConfigError, match=r"'data\.worker'.*'data\.workers'"):
        problem_of(data=node(target, batch=2, worker=1))
    with pytest.raises(ConfigError, match=r"data\.size .*many"):
        problem_of(data=node(target, size="many"))


def test_signatures_are_read_without_building_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "LIMIT = 3\nclass Mine:\n    def __init__(self, a, b: int = LIMIT, *, c=(1, 2), d=object()):\n"
        "        raise AssertionError\n"
    )
    (tmp_path / "unseen_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    made = {"_target_": "unseen_module.Mine"}
    assert argument_defaults(made) == {"b": 3, "c": [1, 2]}
    with pytest.raises(ConfigError, match=r"'model\.e'"):
        check({"model": made | {"a": 1, "e": 2}}, {"model": None})
    with pytest.raises(ConfigError, match=r"^model\.b must be a whole number, got many$"):
        check({"model": made | {"a": 1, "b": "many"}}, {"model": None})


def test_a_module_that_is_no_python_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn_module.py").write_text("x = 1\ndef made(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"^x: there is no 'torn_module\.made' \(invalid syntax \(.*, line 2\)\)$"):
        build(OmegaConf.create({"_target_": "torn_module.made"}), "x")


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


def test_a_run_that_goes_on_does_not_need_the_file_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []
    monkeypatch.setattr("sys.argv", ["coca-train", f"output_dir={tmp_path}", "name=x", "init_from=/gone.pt"])
    with pytest.raises(SystemExit, match="init_from"):
        command.command("train", lambda cfg: began.append(cfg.init_from))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_1.ckpt").touch()
    command.command("train", lambda cfg: began.append(cfg.init_from))
    assert began == ["/gone.pt"]
    monkeypatch.setattr("sys.argv", ["coca-train", f"output_dir={tmp_path}", "name=x", "ckpt_path=/gone.ckpt"])
    with pytest.raises(SystemExit, match="ckpt_path"):
        command.command("train", lambda cfg: began.append(cfg.ckpt_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    command.command("train", lambda cfg: began.append(cfg.ckpt_path))
    assert began == ["/gone.pt", "/gone.ckpt"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("# größer\nseed: 1\n".encode("latin-1"), "error: a config is no text in UTF-8"),
        (b"# @package _global_\nseed: 1\x01\n", r'error: .*(special|control) characters.*mine.yaml", position \d+'),
        (b"# @package _global_\nname: 'mine\n", r"error: '.*mine\.yaml', line 3: "),
    ],
)
def test_a_config_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(content)
    words = ["coca-train", "--config-dir", str(tmp_path), "experiment=mine", f"output_dir={tmp_path}/run", "name=x"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        command.command("train", lambda cfg: None)
    assert re.match(said, str(ended.value.code))


def test_a_name_that_controls_the_terminal_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["coca-train", "name=a\x1b[2Jb", f"output_dir={tmp_path}"])
    with pytest.raises(SystemExit, match=r"^error: name: 'a\\x1b\[2Jb' has characters that control a terminal"):
        command.command("train", lambda cfg: None)


def test_a_traceback_names_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(cfg: DictConfig) -> None:
        raise RuntimeError(f"cannot reach https://me:{'x' * 12}@example.com/a")

    monkeypatch.setattr("sys.argv", ["coca-train", "name=x", f"output_dir={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        command.command("train", broken)
    said = str(ended.value.code)
    assert said.startswith("Traceback")
    assert "example.com/a" in said
    assert "x" * 12 not in said


def test_hydras_own_part_is_shown_resolved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["coca-train", "--cfg", "hydra", "--resolve", "name=mine"])
    command.command("train", lambda cfg: None)
    assert "dir: outputs/mine" in capsys.readouterr().out

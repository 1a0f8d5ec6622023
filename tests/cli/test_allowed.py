"""What a config may run, attacked: by name, by another name, through references, by a stranger's run folder."""

import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from coca_lit.cli.allowed import check_targets, trust_modules
from coca_lit.cli.assembly import build
from coca_lit.cli.command import compose
from coca_lit.errors import ConfigError
from helpers.sweeps import ROOT, run_in

REFUSED = {
    "os.system": "os",
    "posix.system": "posix",
    "builtins.eval": "builtins",
    "subprocess.Popen": "subprocess",
    "functools.partial": "functools",
    "numpy.load": "numpy",
    "webdataset.WebDataset": "webdataset",
    "torch.load": "torch.serialization",
    "torch.hub.load": "torch.hub",
    "torch.jit.load": "torch.jit._serialization",
    "torch.package.PackageImporter": "torch.package.package_importer",
    "torch.utils.data.datapipes.iter.FileOpener": "torch.utils.data.datapipes.iter.fileopener",
    "timm.create_model": "timm.models._factory",  # of which an argument is a file that is unpickled
    # By another name, in modules that may be used.
    "coca_lit.files.shutil.rmtree": "shutil",
    "coca_lit.files.os.unlink": "posix",
    "torch.optim.lr_scheduler.types.FunctionType": "builtins",
    "torch.nn.modules.module.torch.load": "torch.serialization",
    "helpers.running.subprocess.run": "subprocess",
    # A method that reads what a constructor does not.
    "lightning.pytorch.plugins.io.TorchCheckpointIO.load_checkpoint": "lightning.fabric.plugins.io.torch_io",
    "lightning.pytorch.LightningModule.load_from_checkpoint": "lightning.pytorch.core.module",
}


@pytest.fixture(autouse=True)
def nothing_named() -> None:
    trust_modules([])


@pytest.mark.parametrize("target", REFUSED)
def test_what_is_not_listed_is_refused_with_what_to_add(target: str) -> None:
    with pytest.raises(ConfigError, match=f"may not run '{target}'.*imports=\\[{REFUSED[target]}\\]$") as refused:
        check_targets([target])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "target",
    [
        "coca_lit.models.create_model",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.LightningDataModule",
        "lightning.pytorch.Trainer",
        "timm.optim.Lion",
        "torch.nn.GELU",
        "torch.nn.functional.gelu",
        "torch.optim.AdamW",
        "torchmetrics.Accuracy",
        "helpers.objectives.DrawnTargets",
    ],
)
def test_what_trains_and_what_is_ones_own_passes(target: str) -> None:
    check_targets([target])


def test_nothing_is_imported_from_a_module_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages"
    package.mkdir()
    (package / "stranger.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nThing = dict\n")
    monkeypatch.syspath_prepend(package)
    with pytest.raises(ConfigError, match=r"imports=\[stranger\]"):
        compose("train", ["+callbacks.mine._target_=stranger.Thing"])
    assert not (tmp_path / "imported").exists()


def test_imports_allow_a_module() -> None:
    with pytest.raises(ConfigError, match=r"imports=\[json\]"):
        compose("train", ["+callbacks.mine._target_=json.JSONDecoder"])
    compose("train", ["+callbacks.mine._target_=json.JSONDecoder", "imports=[json]"])
    with pytest.raises(ConfigError, match=r"imports=\[json"):  # not for the next config
        compose("train", ["+callbacks.mine._target_=json.JSONDecoder"])


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "coca_lit.data.batch.Batch", "images": {"_target_": "os.system", "command": "touch run"}},
        {"_target_": "coca_lit.data.batch.Batch", "images": [{"_target_": "builtins.eval", "_args_": ["1"]}]},
        {"_target_": "${oc.decode:os.system}", "command": "touch run"},
        {"_target_": "coca_lit.data.batch.Batch", "images": "${oc.decode:'{_target_: os.system, command: touch run}'}"},
    ],
)
def test_parts_and_references_are_checked_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="may not run"):
        build(OmegaConf.create(node), "mine")
    assert not list(tmp_path.iterdir())


def test_a_reference_is_no_name_of_a_target() -> None:
    with pytest.raises(ConfigError, match="must be the name"):
        compose("train", ["+callbacks.mine._target_='${oc.env:HOME}'"])


@pytest.mark.parametrize(
    "word",
    [
        "+hydra.callbacks.mine._target_=torch.load",
        "+hydra.callbacks.mine='${oc.decode:\"{_target_: torch.load}\"}'",
        "+hydra.callbacks.mine._target_=coca_lit.files.shutil.rmtree",
        "hydra.callbacks.sweep.report=torch.load",
        "+hydra.job_logging.handlers.mine.class=torch.load",
        "hydra.job_logging.filters.secrets='${oc.decode:\"{(): torch.load}\"}'",
    ],
)
def test_hydra_builds_from_its_own_part_no_more(word: str) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.(callbacks|job_logging)( may not run|: .* must be plain)"):
        compose("train", [word])


ATTACKS = [
    {"_target_": "os.system", "command": "touch RUN"},
    {"_target_": "builtins.eval", "_args_": ["open('RUN', 'w')"]},
    {"_target_": "torch.package.PackageImporter", "file_or_buffer": "evil.pt"},
    {"_target_": "coca_lit.projects.absent.run.Now"},
]


@pytest.mark.parametrize("attack", ATTACKS, ids=[str(attack["_target_"]) for attack in ATTACKS])
def test_a_strangers_config_runs_nothing(tmp_path: Path, attack: dict[str, object]) -> None:
    config = {"evals": {"scenes_captions": attack, "mine": attack}, "callbacks": {"mine": attack}, "name": "x"}
    run = tmp_path / "outputs" / "x"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "experiment").mkdir()
    config["evals"] = {"mine": attack}  # in place of one of ours its arguments are refused first
    (tmp_path / "experiment" / "theirs.yaml").write_text("# @package _global_\n" + yaml.safe_dump(config))
    commands = [
        ["-m", "coca_lit.cli.evaluate", "checkpoint=outputs/x", "name=y"],
        ["-m", "coca_lit.tools.report", "outputs/x"],
        [str(ROOT / "train.py"), "--config-dir", ".", "experiment=theirs", "trainer=smoke"],
    ]
    for command in commands:
        done = run_in(tmp_path, sys.executable, *command)
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert not (tmp_path / "RUN").exists()
    known = "may not run" if "absent" not in str(attack) else "the project 'absent' is not installed"
    assert known in done.stderr

"""Parts of a run that a user has written, as small as they can be."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from coca_lit.cli import command
from coca_lit.cli.assembly import build, build_data, build_evals, build_scoring, build_trainer
from coca_lit.cli.early import check_length
from coca_lit.cli.module import build_module
from coca_lit.cli.schema import argument_defaults, check
from coca_lit.errors import ConfigError
from coca_lit.evals import Settings
from coca_lit.tokenizer import get_tokenizer
from coca_lit.training.objectives import Objective, terms_of
from coca_lit.weights.load import save_model
from helpers.running import compose

GUEST = """
from coca_lit.training.objectives import Objective

def terms(net, batch, factor=1.0):
    return {"mine": factor * batch}

def contrast(net, batch):
    return {"mine": batch}

contrast.trains = ["image_projection", "logit_scale"]

class Callable:
    def __call__(self, net, batch):
        return {"mine": batch}

class Weighted(Objective):
    def __init__(self):
        super().__init__(mine=3.0)

    def forward(self, net, batch):
        return {"mine": batch}

def factory():
    return Weighted()

def without_name(net, batch):
    return batch

def records(split, count=3):
    from coca_lit.data.scenes.render import scene_records
    return scene_records(split, count=count)

def bare(model, records, settings):
    return len(records)

def counted(model, records, settings, offset=0):
    return {"images": len(records) + offset}

def ones(records, captions):
    raise NotImplementedError

class Start(Objective):
    def begin(self, net):
        self.start = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def forward(self, net, batch):
        return {"mine": batch}

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

class Endless(IterableDataset):
    def __iter__(self):
        return iter(())

class Stream(LightningDataModule):
    prepared = False

    def prepare_data(self):
        self.prepared = True

    def train_dataloader(self):
        return DataLoader(Endless())
"""


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guest_parts.py").write_text(GUEST)
    monkeypatch.syspath_prepend(tmp_path)


def objective(*words: str) -> Objective:
    module = build_module(compose(*(f"model.objectives.mine.{word}" for word in words)))
    return module.objectives["mine"]


@pytest.mark.parametrize(
    ("words", "factor"),
    [
        (["_target_=guest_parts.terms"], 1),
        (["_target_=guest_parts.terms", "factor=2"], 2),
        (["_target_=guest_parts.terms", "_partial_=true"], 1),
        (["_target_=guest_parts.Callable"], 1),
        (["_target_=guest_parts.Weighted"], 3),
        (["_target_=guest_parts.factory"], 3),
    ],
)
def test_a_function_or_a_callable_is_an_objective(guest: None, words: list[str], factor: float) -> None:
    made = objective(*words)
    terms = terms_of(None, [made], torch.tensor(5.0))  # type: ignore[arg-type]
    assert terms.weighted_sum([made]).item() == 5 * factor
    assert list(terms.values) == ["mine"]


def test_a_function_that_is_called_later_reaches_other_processes() -> None:
    node = {
        "_target_": "coca_lit.data.batch.Batch",
        "images": [{"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.5}],
    }
    later = pickle.loads(
        pickle.dumps(build(OmegaConf.create(node | dict.fromkeys(("tokens", "lengths", "keys"))), "x"))
    )
    assert later.images[0]([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"] == 0.5


def test_a_function_may_name_what_it_trains(guest: None) -> None:
    """What no loss trains is frozen, and of a function nobody else could know it."""
    module = build_module(compose("model.contrastive_weight=0", "model.objectives.mine._target_=guest_parts.contrast"))
    frozen = {name.partition(".")[0] for name, p in module.net.named_parameters() if not p.requires_grad}
    assert not frozen & {"image_projection", "logit_scale"}
    assert any(not p.requires_grad for p in module.net.text.parameters())


def evaluations(*words: str) -> list[Any]:
    return build_evals(compose("evals=[]", *(f"+evals.mine.{word}" for word in words)))[0]


@pytest.mark.parametrize(("words", "images"), [([], 3), (["offset=7"], 10), (["records.count=4"], 4)])
def test_a_function_is_an_evaluation_of_the_name_of_its_key(
    guest: None, tmp_path: Path, words: list[str], images: int
) -> None:
    function = ("_target_=guest_parts.counted", "records._target_=guest_parts.records", "records.split=val")
    (made,) = evaluations(*function, *words, "every=2")
    assert made.evaluate(None, Settings(tmp_path)) == {"mine/images": images}
    assert made.every == 2


def test_a_function_that_returns_a_bare_number_is_named(guest: None, tmp_path: Path) -> None:
    function = ("_target_=guest_parts.bare", "records._target_=guest_parts.records", "records.split=val")
    with pytest.raises(ConfigError, match=r"^evals\.mine must return \{score: value\}, got a int$"):
        evaluations(*function)[0].evaluate(None, Settings(tmp_path))


PARTS = """
from . import base as b

class Derived(b.Base):
    pass

class Log(b.Base):
    def __init__(self, output_dir):
        super().__init__(output_dir)
"""


@pytest.mark.parametrize("module", ["package", "package.inner"])
def test_parts_behind_relative_imports_get_what_they_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    package = f"parts_{len(module)}"
    for name, source in (
        ("__init__", "from .impl import Log"),
        ("inner/__init__", "from ..impl import Log, Derived"),
        ("base", "class Base:\n    def __init__(self, output_dir): self.place = output_dir"),
        ("impl", PARTS),
    ):
        (file := tmp_path / package / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{source}\n")
    monkeypatch.syspath_prepend(tmp_path)
    target = module.replace("package", package)
    assert build(OmegaConf.create({"_target_": f"{target}.Log"}), "x", {"output_dir": "here"}).place == "here"
    derived = OmegaConf.create({"_target_": f"{package}.inner.Derived"})
    assert build(derived, "x", {"output_dir": "here"}).place == "here"
    assert argument_defaults({"_target_": f"{target}.Log"}) == {}
    with pytest.raises(ConfigError, match=r"'x\.outputdir'.*'x\.output_dir'"):
        check({"x": {"_target_": f"{target}.Log", "outputdir": 1}}, {"x": None})


def test_parts_of_a_file_that_is_also_a_package_get_what_they_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that runs alone, too, where a relative import fails."""
    (tmp_path / "alone.py").write_text(
        "try:\n    from .alone_parts import Own\nexcept ImportError:\n    from alone_parts import Own\n"
    )
    (tmp_path / "alone_parts.py").write_text("class Own:\n    def __init__(self, width=3): self.width = width\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert argument_defaults({"_target_": "alone.Own"}) == {"width": 3}
    with pytest.raises(ConfigError, match=r"'x\.widht'.*'x\.width'"):
        check({"x": {"_target_": "alone.Own", "widht": 1}}, {"x": None})


def test_an_objective_begins_with_the_weights_of_init_from(guest: None, tmp_path: Path) -> None:
    source = build_module(compose()).net
    save_model(source, tmp_path / "start.safetensors")
    torch.manual_seed(1)
    words = (f"init_from={tmp_path}/start.safetensors", "model.objectives.mine._target_=guest_parts.Start")
    module = build_module(compose(*words))
    begun = module.objectives["mine"].start
    assert all(torch.equal(begun[name], tensor) for name, tensor in source.state_dict().items())


@pytest.mark.filterwarnings("ignore:You defined a .validation_step")
def test_a_stream_needs_a_number_of_steps(guest: None, tmp_path: Path) -> None:
    words = ("trainer=cpu", "trainer.max_epochs=1", "trainer.max_steps=-1", "data._target_=guest_parts.Stream")
    cfg = compose(*words, f"output_dir={tmp_path}")
    data, module = build_data(cfg, get_tokenizer("clip")), build_module(cfg)
    assert not data.prepared  # Lightning does it, in one process of a machine
    trainer = build_trainer(cfg, build_scoring(cfg, []), None, False)
    with pytest.raises(ConfigError, match=r"^trainer\.max_steps"):
        trainer.fit(module, datamodule=data)
    assert data.prepared


@pytest.mark.parametrize("splits", [True, False])
def test_lightning_gives_ranks_their_samples_where_the_data_do_not(tmp_path: Path, splits: bool) -> None:
    cfg = compose(f"output_dir={tmp_path}", "trainer=cpu")
    connector = build_trainer(cfg, build_scoring(cfg, []), None, splits)._accelerator_connector
    assert connector.use_distributed_sampler is not splits


def test_a_run_on_the_cpu_has_its_precision_and_not_that_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose(f"output_dir={tmp_path}", "trainer.accelerator=cpu", "trainer.precision=auto")
    for module in ("assembly", "runtime"):
        monkeypatch.setattr(f"coca_lit.cli.{module}.best_device", lambda: "cuda")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert build_trainer(cfg, build_scoring(cfg, [])).precision == "32-true"


def test_a_class_needs_no_name_and_a_measure_is_handed_over(guest: None) -> None:
    captions = ("_target_=coca_lit.evals.captions.CaptionScores", "records._target_=guest_parts.records")
    (made,) = evaluations(*captions, "records.split=val", "measures.ones._target_=guest_parts.ones")
    assert made.name == "mine"
    assert callable(made.measures["ones"])


def test_evaluations_read_the_split_that_the_training_reads(tmp_path: Path) -> None:
    """Karpathy's file beside photos that hold none, where COCO's own validation set would be scored."""
    (tmp_path / "coco" / "val2017").mkdir(parents=True)
    for i in range(4):
        (tmp_path / "coco" / "val2017" / f"{i:012d}.jpg").touch()
    row = {"sentences": [{"raw": "a dog"}]}
    splits = ["train", "restval", "val", "val"]
    images = [
        row | {"filename": f"COCO_val2014_{i:012d}.jpg", "split": split, "imgid": i, "cocoid": i}
        for i, split in enumerate(splits)
    ]
    (tmp_path / "split.json").write_text(json.dumps({"images": images}))
    words = (f"data.root={tmp_path}/coco", f"data.records.karpathy={tmp_path}/split.json", "init_from=null")
    cfg = compose("experiment=finetune_mscoco", *words)
    built, _ = build_evals(cfg)
    assert {made.name: [record.id for record in made.records] for made in built} == {"mscoco": [2, 3]}
    assert len(built) == 2
    assert built[0].training_captions() == ["a dog", "a dog"]  # type: ignore[attr-defined]
    known = command.compose("evaluate", ["checkpoint=x", "evals=mscoco"]).evals.values()
    assert [node.records.karpathy for node in known] == [None, None]


@pytest.mark.parametrize(
    ("other", "clash"),
    [
        (["_target_=coca_lit.evals.retrieval.RetrievalScores", "name=scenes"], "scenes/t2i_recall@1"),
        (["_target_=coca_lit.evals.captions.CaptionScores", "name=scenes"], None),
        (["_target_=coca_lit.evals.retrieval.RetrievalScores"], None),
    ],
)
def test_two_evaluations_of_one_name_share_no_score(guest: None, other: list[str], clash: str | None) -> None:
    words = [f"+evals.mine.{word}" for word in (*other, "records._target_=guest_parts.records", "records.split=val")]
    cfg = compose("evals=[scenes_retrieval]", *words)
    if clash is None:
        assert len(build_evals(cfg)[0]) == 2
        return
    with pytest.raises(ConfigError, match=rf"^evals.scenes_retrieval and evals.mine both give {clash}: set evals.NAME"):
        build_evals(cfg)
    cfg.scoring.skip_missing = True
    built, missing = build_evals(cfg)
    assert len(built) == 1
    assert missing.keys() == {"mine scenes"}


@pytest.mark.parametrize("epochs", ["-1", "null"])
def test_a_training_needs_a_length_besides_its_time(tmp_path: Path, epochs: str) -> None:
    cfg = compose(
        f"output_dir={tmp_path}", "trainer=cpu", "+trainer.max_time=00:00:01:00", f"trainer.max_epochs={epochs}"
    )
    with pytest.raises(ConfigError, match=r"^trainer.max_epochs or trainer.max_steps must be set: "):
        check_length(cfg.trainer)
    for steps, epochs, limit in ((3, cfg.trainer.max_epochs, 3), (None, 2, -1)):
        cfg.trainer.max_steps, cfg.trainer.max_epochs = steps, epochs
        check_length(cfg.trainer)
        assert build_trainer(cfg, build_scoring(cfg, [])).max_steps == limit

"""`coca-evaluate` from its configuration to its files, on one process and on three."""

import json
import subprocess
import sys

import open_clip
import pytest
import torch
from omegaconf import OmegaConf
from torchvision.transforms.functional import pil_to_tensor

from coca_lit.cli.command import compose as compose_config
from coca_lit.cli.evaluate import evaluate, run, with_evals
from coca_lit.cli.words import to_override
from coca_lit.data.scenes.render import scene_records, scene_training_captions
from coca_lit.errors import ConfigError, DataError
from coca_lit.evals.retrieval import RetrievalScores
from coca_lit.models import create_model
from coca_lit.weights.load import load_model, save_model
from coca_lit.weights.open_clip import to_open_clip
from coca_lit.weights.open_clip.config import open_clip_config
from helpers import naive
from helpers.evaluated_runs import check_evaluations_follow, run_folder
from helpers.running import without_java


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small CoCa with random weights, exported."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(create_model("coca_tiny"), path)
    return path


def compose(folder, *overrides):
    folder.mkdir(exist_ok=True, parents=True)
    return compose_config("evaluate", [f"output_dir={folder}", "name=test", f"data_dir={folder}", *overrides])


def test_captions_and_retrieval(checkpoint, tmp_path, monkeypatch):
    without_java(monkeypatch)
    cfg = compose(tmp_path, f"checkpoint={checkpoint}", "scoring.images=8", "evals=[scenes_captions,scenes_retrieval]")
    results = run(cfg)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert {"scenes/CIDEr", "scenes/Bleu_4", "scenes/t2i_recall@1"} <= results.keys()
    predictions = json.loads((tmp_path / "predictions" / "scenes.json").read_text())
    assert len({row["image_id"] for row in predictions}) == len(predictions) == 8
    assert (tmp_path / "samples" / "scenes.png").exists()
    assert cfg.image_size == 32  # the model's


@pytest.mark.slow
def test_another_image_size(checkpoint, tmp_path):
    larger = load_model(checkpoint)
    larger.set_image_size(48)
    save_model(larger, tmp_path / "larger.safetensors")
    chosen = ("scoring.images=64", "evals=[scenes_retrieval]")
    expected = run(compose(tmp_path / "saved", f"checkpoint={tmp_path}/larger.safetensors", *chosen))
    cfg = compose(tmp_path / "chosen", f"checkpoint={checkpoint}", "image_size=48", *chosen)
    assert run(cfg) == expected != run(compose(tmp_path / "own", f"checkpoint={checkpoint}", *chosen))
    assert OmegaConf.load(tmp_path / "chosen" / "config.yaml").image_size == 48
    with pytest.raises(ConfigError, match=r"image_size .*\b0"):
        run(compose(tmp_path / "none", f"checkpoint={checkpoint}", "image_size=0", *chosen))


@pytest.mark.slow
def test_all_skips_what_is_missing_and_says_where_it_looked(checkpoint, tmp_path, capsys):
    absent = ["mscoco_captions", "mscoco_retrieval", "flickr30k_retrieval", "flickr8k_captions", "nocaps_captions"]
    off = [f"evals.{name}=null" for name in ("scenes_captions", "compositional_captions")]
    results = run(compose(tmp_path, f"checkpoint={checkpoint}", "scoring.images=8", "evals=all", *off))
    not_run = json.loads((tmp_path / "not_run.json").read_text())
    assert set(absent) <= not_run.keys()
    assert str(tmp_path / "nocaps") in not_run["nocaps_captions"]
    assert {name.split("/")[0] for name in results} >= {"scenes", "compositional"}
    assert "skipped mscoco_captions: the Karpathy split" in capsys.readouterr().out


@pytest.mark.slow
def test_an_open_clip_clip(tmp_path):
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    torch.save(open_clip.CLIP(16, vision_cfg=vision, text_cfg=text).state_dict(), tmp_path / "clip.pt")
    evals = "evals=[scenes_captions,scenes_retrieval,scenes_zeroshot]"
    results = run(compose(tmp_path, f"checkpoint={tmp_path}/clip.pt", "quick_gelu=false", "scoring.images=6", evals))
    assert {"scenes/t2i_recall@1", "scenes/top1"} <= results.keys()
    assert "scenes captions" in json.loads((tmp_path / "not_run.json").read_text())


def test_a_coca_has_the_activations_of_its_file(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="checkpoint: quick_gelu"):
        run(compose(tmp_path, f"checkpoint={checkpoint}", "quick_gelu=true", "evals=[scenes_retrieval]"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("some.weight", "CoCa"), ("visual.layer1.0.weight", "CLIP")])
def test_checkpoint_of_another_architecture(tmp_path, name, kind):
    state = {name: torch.zeros(2)} | ({"logit_scale": torch.zeros(())} if "visual" in name else {})
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=f"checkpoint: .*not an OpenCLIP {kind}"):
        run(compose(tmp_path, f"checkpoint={tmp_path / 'other.pt'}", "evals=[scenes_retrieval]"))


def test_a_scoring_that_cannot_start_moves_nothing(checkpoint, tmp_path):
    before = tmp_path / "results.json"
    before.write_text("{}")
    with pytest.raises(DataError, match="Karpathy"):
        run(compose(tmp_path, f"checkpoint={checkpoint}", "evals=[mscoco_captions]"))
    for word in ("report=false", f"scoring.generate.prompt={'a_' * 40}"):
        with pytest.raises(ConfigError, match=f"^{word.partition('=')[0].rpartition('.')[0]}"):
            run(compose(tmp_path, f"checkpoint={checkpoint}", "evals=[scenes_captions]", word))
    assert [*tmp_path.rglob("*")] == [before]
    (saved := tmp_path / "checkpoints" / "step_1.ckpt").parent.mkdir()
    saved.touch()
    with pytest.raises(ConfigError, match="holds the checkpoints of a training run: choose another name"):
        run(compose(tmp_path, f"checkpoint={checkpoint}", "evals=[scenes_retrieval]"))
    assert {*tmp_path.rglob("*")} == {before, saved.parent, saved}


def test_mistakes_are_one_sentence(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["coca-evaluate", "checkpoint=absent.ckpt", f"hydra.run.dir={folder}"])
    with pytest.raises(SystemExit, match=r"^error: checkpoint: .*'absent\.ckpt'"):
        evaluate()
    monkeypatch.setattr("sys.argv", ["coca-evaluate", f"hydra.run.dir={folder}"])
    with pytest.raises(SystemExit, match=r"checkpoint=VALUE.*coca-evaluate checkpoint=outputs/my_run"):
        evaluate()
    assert not folder.exists()


@pytest.mark.slow
def test_the_evaluations_are_those_of_the_run(tmp_path, monkeypatch, capsys):
    """By name and as far as we ship them: a stranger's config builds nothing. Its folders count if they are there."""
    place = tmp_path / "flickr photos"
    place.mkdir()
    evals = {"flickr8k_captions": {"_target_": "os.system"}, "mine": {"_target_": "os.system"}, "scenes_choice": None}
    config = {"evals": evals, "roots": {"flickr8k": "${data.root}", "mscoco": "gone"}, "data": {"root": str(place)}}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    for checkpoint in (tmp_path, tmp_path / "checkpoints" / "last.ckpt"):
        words = with_evals([f"checkpoint={checkpoint}"])
        assert words[1:] == ["evals=[flickr8k_captions]", f'roots.flickr8k="{place}"']
        assert compose_config("evaluate", words).evals.keys() == {"flickr8k_captions"}
    assert "evals=[flickr8k_captions]" in capsys.readouterr().out
    for given in (["evals=all"], ["evals=[]"]):
        assert with_evals([f"checkpoint={tmp_path}", *given]) == [f"checkpoint={tmp_path}", *given]
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").touch()
    monkeypatch.setattr("sys.argv", ["coca-evaluate", f"checkpoint={other / 'model.safetensors'}"])
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(SystemExit, match=r"belongs to no scored run: .*evals=.*--help"):
        evaluate()


def test_the_evaluations_read_as_those_of_the_run(tmp_path):
    (tmp_path / "split.json").touch()
    check_evaluations_follow(tmp_path, "mscoco", "karpathy", f"{tmp_path}/split.json")


def test_a_strangers_frames_are_a_number_and_its_files_are_there(tmp_path):
    follow = {key: f"${{oc.select:data.records.{key},null}}" for key in ("frames", "karpathy")}
    data = {"records": {"frames": [1, 2], "karpathy": str(tmp_path / "gone.json")}}
    word = run_folder(tmp_path, {"evals": {"mscoco_captions": {"records": follow}}, "data": data})
    assert with_evals([word]) == [word, "evals=[mscoco_captions]"]


def test_a_path_with_a_comma_is_one_checkpoint(tmp_path, monkeypatch):
    """As each job of a sweep over two keys has; a sweep names several."""
    for name, evaluation in (("lr=1,seed=0", "scenes_captions"), ("a,b", "scenes_retrieval"), ("c", "scenes_choice")):
        run_folder(tmp_path / name, {"evals": {evaluation: {"_target_": ""}}})
    word = to_override(f"checkpoint={tmp_path}/lr=1,seed=0")
    assert with_evals([word]) == [word, "evals=[scenes_captions]"]
    assert compose_config("evaluate", [word]).checkpoint == f"{tmp_path}/lr=1,seed=0"
    word = to_override(f"checkpoint='{tmp_path}/a,b',{tmp_path}/c")
    assert with_evals([word]) == [word, "evals=[scenes_retrieval,scenes_choice]"]
    monkeypatch.setenv("HOME", str(tmp_path))
    word = to_override("checkpoint='~/a,b'")
    assert with_evals([word]) == [word, "evals=[scenes_retrieval]"]
    with pytest.raises(ConfigError, match="photos belongs to no scored run"):
        with_evals(["checkpoint=photos"])


@pytest.mark.parametrize("path", ["x" * 300, "~nobody_here/x", "a\0b"])
def test_a_path_that_no_system_takes_is_one_that_is_not_there(path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["coca-evaluate", f"checkpoint={path}"])
    with pytest.raises(SystemExit, match=r"error: checkpoint: there is no checkpoint"):
        evaluate()


@pytest.mark.parametrize(("evals", "split"), [(["my_photos_captions"], ["val"]), (["scenes_captions"], [])])
def test_own_photos_are_scored_on_the_split_of_the_run(tmp_path, evals, split):
    config = {"evals": {name: {"_target_": ""} for name in evals}, "scoring": {"split": "val"}}
    words = with_evals([run_folder(tmp_path, config)])
    assert [word.partition("=")[2].strip('"') for word in words if word.startswith("scoring.split=")] == split


BEAM = {"strategy": "beam", "num_beams": 4, "length_penalty": 0.7, "prompt": "it's a: {photo}, true"}


def test_captions_are_written_as_the_run_wrote_them_unless_the_user_says_how(tmp_path, capsys):
    config = {"evals": {"scenes_captions": {"_target_": ""}}, "scoring": {"generate": BEAM}}
    word = run_folder(tmp_path, config)
    assert compose_config("evaluate", with_evals([word])).scoring.generate == BEAM
    assert (
        'scored: evals=[scenes_captions] scoring.generate={strategy: "beam", num_beams: 4,' in capsys.readouterr().out
    )
    for given in ("scoring.generate.num_captions=1", "++scoring.generate={strategy: greedy}", "scoring.generate=null"):
        assert with_evals([word, given]) == [word, given, "evals=[scenes_captions]"]
    assert "scoring.generate" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "generate",
    [
        {"_target_": "os.system", "command": "true"},
        {"strategy": "beam", "num_beams": {"_target_": "os.cpu_count"}},
        {"strategy": "beam", "prompt": "${oc.env:HOME}"},
        {"strategy": "beam", "prompt": ["a", "b"]},
        {"strategy": "beam", "x}, a: {b": 1},
        "${data}",
    ],
)
def test_a_strangers_options_of_captions_are_plain_or_not_taken_over(tmp_path, capsys, generate):
    config = {"evals": {"scenes_captions": {"_target_": ""}}, "scoring": {"generate": generate}}
    word = run_folder(tmp_path, config)
    assert with_evals([word]) == [word, "evals=[scenes_captions]"]
    assert "scoring.generate holds more than plain options and is not taken over" in capsys.readouterr().out


def test_runs_that_differ_are_scored_alike(tmp_path, capsys):
    """On the data of the first one, and with captions as none of them wrote."""
    for name in ("a", "b"):
        (tmp_path / name / "photos").mkdir(parents=True)
        data = {"data": {"root": f"{tmp_path}/{name}/photos"}, "roots": {"my_photos": "${data.root}"}}
        scoring = {"generate": BEAM} if name == "a" else {}
        run_folder(tmp_path / name, {"evals": {"my_photos_captions": {"_target_": ""}}, "scoring": scoring, **data})
    words = with_evals([f"checkpoint={tmp_path / 'a'},{tmp_path / 'b'}"])
    assert f'roots.my_photos="{tmp_path}/a/photos"' in words
    assert "scoring.generate" not in str(words)
    said = capsys.readouterr().out
    assert "the runs differ in roots.my_photos" in said
    assert "the runs differ in scoring.generate" in said


def test_own_evaluations_are_named_and_can_be_added(tmp_path, capsys):
    mine = {"_target_": "my_parts.my_score", "rate": 0.5}
    word = run_folder(tmp_path, {"evals": {"mine": mine, "off": None}})
    with pytest.raises(ConfigError, match=r"own evaluations \(mine\) .*: add what its config.yaml has"):
        with_evals([word])
    (tmp_path / "my_parts.py").write_text("def my_score(**options): pass\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        added = with_evals([word, "+evals.mine._target_=my_parts.my_score", "+evals.mine.rate=0.5"])
    assert compose_config("evaluate", added).evals == {"mine": mine}
    assert capsys.readouterr().out == ""
    run_folder(tmp_path, {"evals": {"mine": mine, "scenes_captions": {"_target_": ""}}})
    assert with_evals([word]) == [word, "evals=[scenes_captions]"]
    assert "(mine) are not repeated by themselves" in capsys.readouterr().out
    run_folder(tmp_path, {"evals": {f"y\x1b{i}": {"x": 1} for i in range(1000)}})
    with pytest.raises(ConfigError, match=r"^[^\x1b]{1,1000}$"):
        with_evals([word])


@pytest.fixture
def folder(tmp_path):
    """Three images with captions of their own."""
    root = tmp_path / "mine"
    root.mkdir()
    (root / "pictures").mkdir()
    for i, record in enumerate(scene_records("test", count=3)):
        record.image().save(root / "pictures" / f"{i}.png")
    images = [{"id": f"picture {i}", "file_name": f"{i}.png"} for i in range(3)]
    captions = [{"image_id": f"picture {i}", "caption": text} for i, text in enumerate(["a dog", "a cat", "red"])]
    (root / "val.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return root


def folder_evals(root, *kinds):
    parts = {"root": root, "annotations": "val.json", "images": "pictures"}
    chosen = f"evals=[{','.join(f'folder_{kind}' for kind in kinds)}]"
    return [chosen, *(f"evals.folder_{kind}.records.{key}={value}" for kind in kinds for key, value in parts.items())]


@pytest.mark.slow
def test_a_long_context_is_captioned_and_scored_to_its_end(folder, tmp_path, monkeypatch):
    """A file in Apple's layout: captions are those of a plain loop without a cache, and texts are read to the end."""
    without_java(monkeypatch)
    context = 128
    image = {"patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 1}
    sizes = {"image_size": 32, "embed_dim": 64, "pooler_queries": 3, "text_width": 64, "text_heads": 8}
    layers = {"text_layers": 1, "decoder_layers": 1, "cls_mask": "legacy"}
    torch.manual_seed(0)
    model = create_model("coca_ViT-B-32", image_encoder_args=image, context_length=context, **sizes, **layers).eval()
    with torch.no_grad():
        model.decoder.vocabulary.weight.normal_(std=0.5)[model.tokenizer.eot_id] = 0  # no caption ends by itself
    place = tmp_path / "model"
    place.mkdir()
    torch.save(to_open_clip(model), place / "mobileclip2_coca.pt")
    (place / "config.json").write_text(json.dumps(open_clip_config(model)["model_cfg"]))
    expected = []
    for record in scene_records("test", count=3):
        seen, ids = naive.image_tokens(model, pil_to_tensor(record.image())), [model.tokenizer.sot_id]
        while len(ids) < context - 1:
            ids.append(int(naive.next_scores(model, seen, ids).argmax()))
        expected.append(model.tokenizer.decode(ids))
    texts = [expected[0], "dog " * (context - 2), "dog " * (context - 1)]
    val = json.loads((folder / "val.json").read_text())
    for annotation, text in zip(val["annotations"], texts, strict=True):
        annotation["caption"] = text
    (folder / "val.json").write_text(json.dumps(val))
    options = [*folder_evals(folder, "captions", "retrieval"), f"scoring.generate.max_length={context}"]
    results = run(compose(tmp_path / "run", f"checkpoint={place}", "precision=fp32", *options))
    predictions = json.loads((tmp_path / "run" / "predictions" / "folder.json").read_text())
    assert [row["caption"] for row in predictions] == expected
    assert results["folder/exact_match"] == pytest.approx(1 / 3)
    assert results["folder/CIDEr"] > 0
    too_long = [length > context for length in model.tokenizer.lengths(texts)]
    assert too_long[1:] == [False, True]
    assert results["folder/cut_captions"] == pytest.approx(sum(too_long) / 3)


@pytest.mark.slow
def test_a_corrupt_image_is_named(checkpoint, folder, tmp_path, monkeypatch):
    """And costs no scores of other data."""
    (folder / "pictures" / "1.png").write_bytes(b"no picture")
    evals = [*folder_evals(folder, "retrieval"), "scoring.workers=1", "scoring.images=8"]
    with pytest.raises(DataError, match=r"pictures/1\.png is not a readable image"):
        run(compose(tmp_path / "run", f"checkpoint={checkpoint}", *evals))
    evals[0] = "evals=[folder_retrieval,compositional_retrieval]"
    evals[-2] = "scoring.workers=0"  # PyTorch waits 5 s for a worker after an error
    with pytest.raises(DataError, match=r"pictures/1\.png is not a readable image"):
        run(compose(tmp_path / "two", f"checkpoint={checkpoint}", *evals))
    assert any("compositional" in score for score in json.loads((tmp_path / "two" / "results.json").read_text()))
    assert "1.png" in str(json.loads((tmp_path / "two" / "not_run.json").read_text()))
    real = RetrievalScores.evaluate

    def broken(evaluation, *given):
        return 1 / 0 if evaluation.name == "folder" else real(evaluation, *given)

    monkeypatch.setattr(RetrievalScores, "evaluate", broken)  # as one's own may be
    with pytest.raises(DataError, match="division by zero"):
        run(compose(tmp_path / "own", f"checkpoint={checkpoint}", *evals))
    with monkeypatch.context() as patch:
        patch.setenv("COCA_LIT_SWEEP", "x")
        with pytest.raises(DataError, match="division by zero"):
            run(compose(tmp_path / "own_job", f"checkpoint={checkpoint}", *evals))
    monkeypatch.setattr(RetrievalScores, "evaluate", real)
    assert any("compositional" in score for score in json.loads((tmp_path / "own" / "results.json").read_text()))
    monkeypatch.setenv("COCA_LIT_SWEEP", "x")  # a sweep has no scores of a job that fails
    assert any("compositional" in s for s in run(compose(tmp_path / "job", f"checkpoint={checkpoint}", *evals)))


@pytest.mark.slow
def test_novel_captions_and_generation_options(checkpoint, tmp_path, monkeypatch):
    without_java(monkeypatch)
    options = ["scoring.generate={strategy: beam, num_beams: 2, max_length: 8}", "scoring.images=5"]
    results = run(compose(tmp_path, f"checkpoint={checkpoint}", "evals=[scenes_captions]", *options))
    captions = [row["caption"] for row in json.loads((tmp_path / "predictions" / "scenes.json").read_text())]
    assert max(len(caption.split()) for caption in captions) <= 6  # 8 tokens with start and end
    known = set(scene_training_captions())
    assert results["scenes/novel"] == sum(caption not in known for caption in captions) / 5
    for option, said in (("max_length: 999", "999"), ("num_beam: 2", "'num_beams'")):
        with pytest.raises(ConfigError, match=f"^scoring.*{said}"):
            run(compose(tmp_path, f"checkpoint={checkpoint}", "evals=[]", f"scoring.generate={{{option}}}"))


def all_kinds(folder, checkpoint):
    """Everything that an evaluation leaves behind, from one rank of any number."""
    with pytest.MonkeyPatch.context() as patch:
        without_java(patch)
        evals = "evals=[scenes_captions,scenes_retrieval,scenes_zeroshot]"
        results = run(compose(folder, f"checkpoint={checkpoint}", "scoring.images=13", evals, "threads=1"))
    return results


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same(on_ranks, checkpoint, tmp_path):
    expected = all_kinds(tmp_path / "1", checkpoint)
    assert {"scenes/CIDEr", "scenes/novel", "scenes/CLIPScore", "scenes/i2t_recall@1", "scenes/top1"} <= expected.keys()
    assert on_ranks(3, all_kinds, tmp_path / "3", checkpoint) == [expected] * 3
    for file in ("predictions/scenes.json", "results.json", "not_run.json", "samples/scenes_retrieval.json"):
        assert (tmp_path / "3" / file).read_text() == (tmp_path / "1" / file).read_text()


@pytest.mark.slow
def test_lightning_is_never_loaded(checkpoint, tmp_path):
    """And garbage is looked for again after the libraries are loaded, but not among them."""
    choice = [f"checkpoint={checkpoint}", "scoring.images=4", "evals=[scenes_retrieval,scenes_zeroshot]"]
    code = (
        "import gc, sys; from coca_lit.cli.evaluate import evaluate; evaluate(); "
        "print('garbage:', gc.isenabled(), gc.get_freeze_count() > 100_000); "
        "import coca_lit.evals.captions; "
        "print('loaded:', sorted({m.split('.')[0] for m in sys.modules} & {'lightning', 'pytorch_lightning'}))"
    )
    command = [sys.executable, "-c", code, *choice, f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == ["garbage: True True", "loaded: []"]
    assert "scenes/t2i_recall@1" in json.loads((tmp_path / "results.json").read_text())

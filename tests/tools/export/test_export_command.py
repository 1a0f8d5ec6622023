"""`coca-export` from its configuration to a folder: complete with a card whose code runs, or not there at all."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError

from coca_lit.cli.command import compose
from coca_lit.cli.words import parse
from coca_lit.data.transforms import build_transform
from coca_lit.errors import ConfigError, DataError
from coca_lit.models import create_model
from coca_lit.tools.export import command as cli
from coca_lit.tools.export import open_clip
from coca_lit.tools.export.folder import new_folder
from coca_lit.weights.load import load_model, save_model

SMALL = {
    "image_encoder_args": {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
    **{"image_size": 32, "embed_dim": 32, "pooler_queries": 3, "context_length": 10, "text_width": 32},
    **{"text_layers": 1, "text_heads": 2, "decoder_layers": 1},
}
RESULTS = {"scenes/CIDEr": 1.2345, "scenes/t2i_recall@1": 0.5, "compositional/CIDEr": 0.25}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small captioner with CLIP's tokenizer in a run folder, as training leaves it."""
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("run")
    (run / "checkpoints").mkdir()
    (run / "results.json").write_text(json.dumps(RESULTS))
    (run / "environment.json").write_text(json.dumps({"command": "python train.py seed=7", "commit": "abc1234"}))
    data = {"_target_": "coca_lit.data.shards.laion.LAIONDataModule", "shards": "${oc.env:SHARDS}"}
    (run / "config.yaml").write_text(yaml.safe_dump({"seed": 7, "scoring": {"split": "val"}, "data": data}))
    path = run / "checkpoints" / "best.safetensors"
    save_model(create_model("coca_vit_b32", **SMALL), path)
    return path


def export(*overrides: str) -> None:
    cli.run(compose("export", overrides))


def snippet(card: Path) -> str:
    return re.findall(r"```python\n(.*?)```", card.read_text(), flags=re.DOTALL)[0]


@pytest.mark.parametrize("options", [["format=safetensors"], ["format=open_clip", "correct_cls_mask=true"]])
def test_the_code_of_the_card_runs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    export(f"checkpoint={checkpoint}", f"output={tmp_path}/deep/model", *options)
    monkeypatch.chdir(tmp_path / "deep")
    assert [path.name for path in Path().iterdir()] == ["model"]
    assert len({path.stat().st_mode for path in Path("model").iterdir()}) == 1  # who reads the card reads the weights
    assert "{folder}" not in Path("model/README.md").read_text()
    Image.effect_noise((40, 50), 99).convert("RGB").save("photo.jpg", quality=95)
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(snippet(Path("model/README.md")), "card", "exec"), {})
    model = load_model(checkpoint)
    pixels = build_transform(size=32)(Image.open("photo.jpg"))[None]
    with torch.no_grad():
        expected = model.encode_image(pixels) @ model.encode_text(model.tokenizer(["a dog", "a cat"])).T
    numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", printed.getvalue())]
    assert numbers == pytest.approx(expected[0].tolist(), abs=1e-4)


def test_what_the_card_says(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(f"checkpoint={checkpoint}", f"output={tmp_path}/model", "format=safetensors")
    assert "as they are" in capsys.readouterr().out
    card = (tmp_path / "model" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "coca_lit"
    assert "license" not in front  # nobody told
    assert "| CIDEr | 123.45 | 25.00 |" in card
    assert "`${oc.env:SHARDS}`" in card  # as in the run folder, whose secrets stay references
    assert "python train.py seed=7" in card
    assert f"coca-export checkpoint={checkpoint} format=safetensors output={tmp_path}/model\n" in card


def test_other_numbers_in_open_clip_are_announced(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = "Train models that others will load in OpenCLIP 3.3 with model.net.cls_mask=legacy"
    choice = (f"checkpoint={checkpoint}", f"output={tmp_path}/model", "format=open_clip")
    with pytest.raises(ConfigError, match=advice):
        export(*choice)
    export(*choice, "correct_cls_mask=true")
    printed, card = capsys.readouterr().out, (tmp_path / "model" / "README.md").read_text()
    for text in (printed, card):
        assert "legacy CLS mask" in text
        assert advice in text


def test_the_card_of_an_interpolated_model(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "before.safetensors"
    save_model(create_model("coca_vit_b32", **SMALL), other)
    mixed = (f"interpolate_with={other}", "weight=0.3", f"output={tmp_path}/model", "format=safetensors")
    export(f"checkpoint={checkpoint}", *mixed)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"0.3 times `{checkpoint}` plus 0.7 times `{other}`." in card
    assert "scores of `best.safetensors` before interpolation" in card


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EXTENSIONS: list[tuple[str, Callable[[str], str]]] = [
    ("README.md", lambda text: text.replace("## Limits", "My notes\n\n## Limits")),
    ("README.md", lambda text: f"{text}My notes\n"),
    ("open_clip_config.json", lambda text: text.replace("{", "{ ", 1)),
]


def test_only_an_earlier_export_is_replaced_and_only_on_request(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    choice = [f"checkpoint={checkpoint}", f"output={output}"]
    export(*choice, "format=safetensors")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"overwrite=true"):
        export(*choice, "format=safetensors")
    export(*choice, "format=open_clip", "correct_cls_mask=true", "overwrite=true")
    assert "model/open_clip_config.json" in tree(tmp_path)
    assert "model/model.safetensors" not in tree(tmp_path)
    (output / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"'mine\.txt'"):
        export(*choice, "format=safetensors", "overwrite=true")
    assert (output / "mine.txt").read_text() == "precious"
    (output / "mine.txt").unlink()
    (output / "__pycache__").mkdir()
    (output / "__pycache__" / "captioner.cpython-311.pyc").touch()
    (output / "__pycache__" / "notes.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"'__pycache__', which is not part of an export"):
        export(*choice, "format=safetensors", "overwrite=true")
    (output / "__pycache__" / "notes.txt").unlink()
    for name, extend in EXTENSIONS:
        before_it = (output / name).read_text()
        (output / name).write_text(extend(before_it))
        with pytest.raises(ConfigError, match=rf"'{re.escape(name)}', which (was changed|is not part of an export)"):
            export(*choice, "format=safetensors", "overwrite=true")
        assert (output / name).read_text() == extend(before_it)
        (output / name).write_text(before_it)
    export(*choice, "format=safetensors", "overwrite=true")
    after = tree(tmp_path)
    assert {k: v for k, v in after.items() if "README" not in k} == {
        k: v for k, v in before.items() if "README" not in k
    }


def test_other_folders_are_never_replaced(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("my notes")
    with pytest.raises(ConfigError, match=r"'README\.md'"):
        export(f"checkpoint={checkpoint}", f"output={tmp_path}", "format=safetensors", "overwrite=true")
    with pytest.raises(ConfigError, match="README"):
        export(f"checkpoint={checkpoint}", f"output={tmp_path}/README.md", "format=safetensors", "overwrite=true")
    export(f"checkpoint={checkpoint}", f"output={tmp_path}/model", "format=safetensors")
    again = [f"checkpoint={tmp_path}/model/model.safetensors", f"output={tmp_path}/model", "overwrite=true"]
    with pytest.raises(ConfigError, match="checkpoint itself"):
        export(*again, "format=open_clip", "correct_cls_mask=true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="checkpoint itself"):
        export(*parse(["checkpoint=~/model", *again[1:], "format=safetensors"])[1])
    mixed = [f"checkpoint={checkpoint}", f"interpolate_with={tmp_path}/model/model.safetensors", "weight=0.5"]
    with pytest.raises(ConfigError, match="checkpoint itself"):
        export(*mixed, *again[1:], "format=safetensors")
    assert (tmp_path / "README.md").read_text() == "my notes"


def test_a_failed_export_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = [f"checkpoint={checkpoint}", f"output={tmp_path}/model"]
    monkeypatch.setattr(open_clip, "TOLERANCE", -1)  # fails when the files are written
    with pytest.raises(ConfigError, match="format: OpenCLIP"):
        export(*choice, "format=open_clip", "correct_cls_mask=true")
    assert list(tmp_path.iterdir()) == []
    export(*choice, "format=safetensors")
    before = tree(tmp_path)
    with pytest.raises(ConfigError):
        export(*choice, "format=open_clip", "correct_cls_mask=true", "overwrite=true")
    assert tree(tmp_path) == before


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    script = "import os, sys; from pathlib import Path; from coca_lit.tools.export.folder import new_folder\n"
    script += "with new_folder(Path(sys.argv[1])) as folder: (folder / 'half').touch(); os.kill(os.getpid(), 9)"
    for name in ("[m]odel", "[m]odel.2"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], timeout=300)
    (tmp_path / ".[m]odel.unfinished.mine").mkdir()
    left = [path for path in tmp_path.iterdir() if (path / "half").exists()]
    assert len(left) == 2
    with new_folder(tmp_path / "[m]odel") as folder:
        (folder / "whole").touch()
    assert {path.name for path in (tmp_path / "[m]odel").iterdir()} == {"whole"}
    assert [path.name[:14] for path in left if path.exists()] == [".[m]odel.2.unf"]
    assert (tmp_path / ".[m]odel.unfinished.mine").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*file/x/y: Not a directory"), new_folder(tmp_path / "file/x/y"):
        pass


def test_a_missing_package_is_named(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ConfigError, match=r"onnxscript.*coca_lit\[onnx\]"):
        export(f"checkpoint={checkpoint}", f"output={tmp_path}/model", "format=onnx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format=openclip"], "^format: .*'openclip'.*'open_clip'"),
        (["format=onnx", "correct_cls_mask=true"], "^correct_cls_mask .*format=open_clip.*onnx"),
        (["format=safetensors", "checkpoint=absent.ckpt"], "'absent.ckpt'"),
        (["format=safetensors", "weight=0.3"], "^weight .*interpolate_with"),
    ],
)
def test_mistakes(checkpoint: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export(f"checkpoint={checkpoint}", f"output={tmp_path}/model", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["link", "fifo", "large"])
def test_sample_pictures_are_files_of_the_run(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    run = shutil.copytree(checkpoint.parent.parent, tmp_path / "run")
    (run / "samples").mkdir()
    picture = run / "samples" / "zz.png"
    if kind == "link":
        (tmp_path / "secret").write_text("precious")
        picture.symlink_to(tmp_path / "secret")
    elif kind == "fifo":
        os.mkfifo(picture)
    else:
        picture.touch()
        os.truncate(picture, 2**32)
    with pytest.raises(DataError, match=r"zz\.png"):
        export(f"checkpoint={run}/checkpoints/best.safetensors", f"output={tmp_path}/model", "format=safetensors")
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("run", "secret")] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.yaml", "[1]", "config.yaml"),
        ("results.json", '{"a/b": "x"}', "results.json"),
        ("config.yaml", "{data: 7, scoring: [1]}", None),
        ("environment.json", '{"command": ["a"], "seconds": {"b": 1}, "machine": "a\\n| `thesis.tex` |"}', None),
    ],
)
def test_a_strangers_run_folder_is_data(
    checkpoint: Path, tmp_path: Path, file: str, content: str, said: str | None
) -> None:
    run = shutil.copytree(checkpoint.parent.parent, tmp_path / "run")
    (run / file).write_text(content)
    words = (f"checkpoint={run}/checkpoints/best.safetensors", f"output={tmp_path}/model", "format=safetensors")
    if said is not None:
        with pytest.raises(DataError, match=said):
            export(*words)
        return
    export(*words)
    assert "\n| `thesis.tex` |" not in (tmp_path / "model" / "README.md").read_text()


def test_no_text_of_a_run_folder_is_markdown(checkpoint: Path, tmp_path: Path) -> None:
    run = shutil.copytree(checkpoint.parent.parent, tmp_path / "run")
    texts = [f"{i}```` ` <b>[x](y)" for i in range(7)]
    data = {"_target_": texts[0], "root": texts[1]}
    lines = f"a\n```\n````\n<b>{texts[2]}"
    config = {"init_from": lines, "data": data, "scoring": {"split": texts[3]}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    facts = {"machine": texts[4], "commit": texts[5], "command": f"```{texts[6]}"}
    (run / "environment.json").write_text(json.dumps(facts))
    export(f"checkpoint={run}/checkpoints/best.safetensors", f"output={tmp_path}/model", "format=safetensors")
    tokens = pytest.importorskip("markdown_it").MarkdownIt().parse((tmp_path / "model" / "README.md").read_text())
    parts = [part for token in tokens for part in token.children or ()]
    assert not [part for part in parts if part.attrGet("href") == "y" or part.content == "<b>"]
    assert not [token for token in tokens if token.type == "html_block" and "<b>" in token.content]
    (block,) = (token.content for token in tokens if token.info == "yaml")
    assert yaml.safe_load(block) == {"init_from": lines, "data": data}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "onnx", "half a file"])
def test_a_full_disk_is_one_sentence_whatever_the_library_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def write() -> None:
        if kind == "safetensors":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        if kind == "half a file":  # which a library did not notice, and cannot read again
            monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
            raise RuntimeError("Wire format was corrupt")
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("cannot serialise the graph") from error

    with pytest.raises(DataError, match=f"{tmp_path}/model.*no space"), new_folder(tmp_path / "model"):
        write()
    assert list(tmp_path.iterdir()) == []

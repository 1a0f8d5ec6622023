"""`coca-demo` up to the page: which model it shows, what it searches, and how it says that something is missing."""

import importlib.util
import json
import socket
import subprocess

import pytest

from coca_lit.cli import command
from coca_lit.cli import demo as cli
from coca_lit.data.scenes.render import scene_records
from coca_lit.demo import builtin
from coca_lit.errors import ConfigError
from coca_lit.weights.load import save_model


def compose(*overrides):
    return command.compose("demo", overrides)


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """The arguments of the page that a command would serve; the working directory is empty."""
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr("coca_lit.demo.page.build_page", lambda *args, **kwargs: calls.append((*args, kwargs)))
    monkeypatch.setattr("coca_lit.demo.serve.serve", lambda *args: None)
    return calls


def fake_run(folder, score, model):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"scenes/exact_match": score}))
    save_model(model, folder / "checkpoints" / "last.safetensors")
    (folder / "checkpoints" / "last.safetensors").rename(folder / "checkpoints" / "last.ckpt")


def test_finds_the_best_finished_demo(tmp_path, tiny_model):
    assert builtin.find_demo_model(tmp_path) is None
    for name, score in (("demo/a", 0.91), ("demo_seed1", 0.95), ("smoke", 0.0), ("sweeps/x", 0.9)):
        fake_run(tmp_path / name, score, tiny_model())
    (tmp_path / "evaluate").mkdir()  # scores without a model
    (tmp_path / "evaluate" / "results.json").write_text('{"scenes/exact_match": 1.0}')
    assert builtin.find_demo_model(tmp_path) == tmp_path / "demo_seed1" / "checkpoints" / "last.ckpt"


def test_trains_the_demo_if_there_is_none_and_says_so(shown, monkeypatch, tmp_path, capsys, tiny_model):
    trained = tmp_path / "trained.safetensors"
    save_model(tiny_model(), trained)
    commands = []

    def run(command):
        commands.append(command)
        (tmp_path / "outputs" / "demo_model" / "checkpoints").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(builtin.subprocess, "run", run)
    with pytest.raises(ConfigError, match="training of the built-in demo model failed"):
        cli.run(compose("checkpoint=builtin"))
    assert "experiment=demo" in commands[0]
    assert "training the demo model, a few minutes" in capsys.readouterr().err


def test_the_training_command_is_that_of_a_run(tmp_path, monkeypatch):
    """The real command, which shows its configuration in place of training for minutes."""
    real, shown = subprocess.run, []

    def show(command):
        shown.append(real([*command, "--cfg", "job"], capture_output=True, text=True, timeout=600))
        return shown[0]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtin.subprocess, "run", show)
    checkpoint = builtin.train_demo_model(cli.OUTPUTS)
    assert checkpoint == cli.OUTPUTS / "demo_model" / "checkpoints" / "last.ckpt"
    assert {"name: demo_model", "max_epochs: 6"} <= {line.strip() for line in shown[0].stdout.splitlines()}


def test_scenes_are_searched_unless_a_folder_is_given(shown, tmp_path, tiny_model):
    save_model(tiny_model(), tmp_path / "tiny.safetensors")
    cli.run(compose("checkpoint=tiny.safetensors"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for record in scene_records("val", count=3):
        record.image().save(photos / f"{record.id}.png")
    (photos / "broken.png").write_text("no image")
    cli.run(compose("checkpoint=tiny.safetensors", "images=photos"))
    save_model(tiny_model(text_layers=1), tmp_path / "other.safetensors")
    for name in ("tiny", "other"):  # with the index of before, which another model cannot use
        cli.run(compose(f"checkpoint={name}.safetensors", "images=photos"))
    assert [len(index) for _, _, index, _ in shown] == [builtin.SCENES, 3, 3, 3]
    assert shown[0][1] == "tiny.safetensors"
    assert shown[0][3] == {"builtin": False}
    assert (tmp_path / "photos.index.safetensors").is_file()


def test_a_model_of_photos_shows_no_scenes(shown, tmp_path, tiny_model):
    save_model(tiny_model(tokenizer=["dog", "cat"]), tmp_path / "photos.safetensors")
    cli.run(compose("checkpoint=photos.safetensors"))
    assert shown[0][2] is None


def test_missing_gradio_is_one_sentence(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "gradio" else importlib.util.find_spec(name))
    with pytest.raises(ConfigError, match=r"needs gradio: pip install 'coca_lit\[demo\]'"):
        cli.run(compose())


def test_port_in_use_is_one_sentence():
    gr = pytest.importorskip("gradio")
    from coca_lit.demo.serve import serve

    with socket.socket() as taken, gr.Blocks() as page:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is taken; choose another one, e.g. port={port + 1}"):
            serve(page, port, wait=False)


def test_mistakes_of_the_command_are_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["coca-demo", "checkpoint=absent.ckpt"])
    with pytest.raises(SystemExit, match=r"^error: checkpoint: there is no checkpoint 'absent\.ckpt'$"):
        cli.demo()
    assert list(tmp_path.iterdir()) == []  # nothing is left behind

"""`coca-demo` up to the page: which model it shows, what it searches, and how it says that something is missing."""

import http.client
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from coca_lit.cli import command
from coca_lit.data.scenes.render import scene_records
from coca_lit.errors import ConfigError, DataError
from coca_lit.progress import ProgressBar
from coca_lit.tools import checkpoint as models
from coca_lit.tools.checkpoint import OUTPUTS
from coca_lit.tools.demo import command as cli
from coca_lit.tools.search.index import ImageIndex
from coca_lit.weights.load import save_model


def compose(*overrides):
    return command.compose("demo", overrides)


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """The arguments of the page that a command would serve; the working directory is empty."""
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr("coca_lit.tools.demo.page.build_page", lambda *args, **kwargs: calls.append((*args, kwargs)))
    monkeypatch.setattr("coca_lit.tools.demo.page.serve", lambda *args: None)
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    yield calls
    if calls:
        assert not os.path.exists(os.environ["GRADIO_TEMP_DIR"])  # with uploads, after the page


@pytest.fixture
def photos(tmp_path):
    """A folder of three."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for record in scene_records("val", count=3):
        record.image().save(folder / f"{record.id}.png")
    return folder


def fake_run(folder, score, model):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"scenes/exact_match": score}))
    save_model(model, folder / "checkpoints" / "last.safetensors")
    (folder / "checkpoints" / "last.safetensors").rename(folder / "checkpoints" / "last.ckpt")


def test_finds_the_best_finished_demo(tmp_path, tiny_model):
    assert models.find_demo_model(tmp_path) is None
    for name, score in (("demo/a", 0.91), ("demo_seed1", 0.95), ("smoke", 0.0), ("sweeps/x", 0.9)):
        fake_run(tmp_path / name, score, tiny_model())
    (tmp_path / "evaluate").mkdir()  # scores without a model
    (tmp_path / "evaluate" / "results.json").write_text('{"scenes/exact_match": 1.0}')
    best = tmp_path / "demo_seed1" / "checkpoints" / "last.ckpt"
    assert models.find_demo_model(tmp_path) == best
    best.rename(tmp_path / "mine.ckpt")
    best.symlink_to(tmp_path / "mine.ckpt")
    with pytest.raises(DataError, match=r"last\.ckpt is a link out of its folder, which is not followed"):
        models.find_demo_model(tmp_path)


@pytest.mark.slow
def test_trains_the_demo_if_there_is_none_and_says_so(shown, monkeypatch, tmp_path, capsys, tiny_model):
    trained = tmp_path / "trained.safetensors"
    save_model(tiny_model(), trained)
    commands = []

    def run(command):
        commands.append(command)
        (tmp_path / "outputs" / "demo_model" / "checkpoints").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(models.subprocess, "run", run)
    with pytest.raises(ConfigError, match="demo model"):
        cli.run(compose("checkpoint=builtin"))
    assert "experiment=demo" in commands[0]
    assert "training the demo" in capsys.readouterr().err


@pytest.mark.slow
def test_the_training_command_is_that_of_a_run(tmp_path, monkeypatch):
    """The real command, which shows its configuration in place of training for minutes."""
    real, shown = subprocess.run, []

    def show(command):
        shown.append(real([*command, "--cfg", "job"], capture_output=True, text=True, timeout=600))
        return shown[0]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.subprocess, "run", show)
    checkpoint = models.train_demo_model(OUTPUTS)
    assert checkpoint == OUTPUTS / "demo_model" / "checkpoints" / "last.ckpt"
    assert {"name: demo_model", "max_epochs: 3"} <= {line.strip() for line in shown[0].stdout.splitlines()}


def test_scenes_are_searched_unless_a_folder_is_given(shown, tmp_path, photos, tiny_model, capsys):
    save_model(tiny_model(), tmp_path / "tiny.safetensors")
    cli.run(compose("checkpoint=tiny.safetensors"))
    (photos / "broken.png").write_text("no image")
    cli.run(compose("checkpoint=tiny.safetensors", "images=photos"))
    save_model(tiny_model(text_layers=1), tmp_path / "other.safetensors")
    for name in ("tiny", "other"):  # with the index of before, which another model cannot use
        before = (tmp_path / "photos.index.safetensors").read_bytes()
        cli.run(compose(f"checkpoint={name}.safetensors", "images=photos"))
    assert (tmp_path / "photos.index.safetensors").read_bytes() == before  # nor replace
    assert "made with another model" in capsys.readouterr().out
    assert [len(index) for _, _, index, _ in shown] == [models.SCENES, 3, 3, 3]
    assert shown[0][1] == "tiny.safetensors"
    assert shown[0][3] == {"builtin": False}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_uploads_go_with_the_process(shown, tmp_path, tiny_model, monkeypatch, number):
    def stopped(*_):
        Path(os.environ["GRADIO_TEMP_DIR"]).mkdir()
        Path(os.environ["GRADIO_TEMP_DIR"], "photo.png").touch()
        signal.raise_signal(number)
        time.sleep(60)

    save_model(tiny_model(), tmp_path / "tiny.safetensors")
    monkeypatch.setattr("coca_lit.tools.demo.page.serve", stopped)
    given = signal.signal(number, signal.SIG_DFL)  # `nohup pytest` ignores one of them
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run(compose("checkpoint=tiny.safetensors"))
        assert ended.value.code == 128 + number
        assert not os.path.exists(os.environ["GRADIO_TEMP_DIR"])
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, given)


def test_what_is_embedded_when_it_is_interrupted_stays(shown, tmp_path, photos, tiny_model, monkeypatch):
    model = tiny_model()
    save_model(model, tmp_path / "tiny.safetensors")

    def interrupted(self, done, total):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "reach", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cli.run(compose("checkpoint=tiny.safetensors", "images=photos"))
    assert len(ImageIndex.load(tmp_path / "photos.index.safetensors", model)) == 3


@pytest.mark.parametrize("port", ["70000", "0", "-1"])
def test_a_port_is_a_number_of_a_port(shown, port):
    with pytest.raises(ConfigError, match=rf"^port: .* number of at least 1 and at most 65535, got {port}$"):
        cli.run(compose(f"port={port}", "checkpoint=absent"))


def test_no_port_is_free(monkeypatch):
    gr = pytest.importorskip("gradio")
    from coca_lit.tools.demo.page import serve

    with gr.Blocks() as page:
        pass
    monkeypatch.setattr(page, "launch", Mock(side_effect=OSError("Cannot find empty port in range: 7860-7959.")))
    with pytest.raises(ConfigError, match=r"no port is free .*7860-7959"):
        serve(page, None, wait=False)
    with pytest.raises(ConfigError, match="port 80 is taken"):
        serve(page, 80, wait=False)


def test_the_page_answers_to_its_own_name_alone():
    """A page of another name that resolves to this machine could read the photos otherwise (DNS rebinding)."""
    gr = pytest.importorskip("gradio")
    from coca_lit.tools.demo.page import serve

    with gr.Blocks() as page:
        pass
    address = serve(page, None, wait=False)
    port = int(address.rstrip("/").rpartition(":")[2])
    answers = {}
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "evil.example", f"evil.example:{port}"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/config", headers={"Host": host, "Origin": f"http://{host}"})
        answer = connection.getresponse()
        answers[host] = answer.status
        assert (b"components" in answer.read()) == (answer.status == 200)
        connection.close()
    page.close()
    assert [*answers.values()] == [200, 200, 400, 400]


@pytest.mark.usefixtures("shown", "photos")
def test_a_file_of_another_kind_is_not_replaced_by_the_index(tmp_path, tiny_model, capsys):
    save_model(tiny_model(), tmp_path / "tiny.safetensors")
    save_model(tiny_model(), tmp_path / "photos.index.safetensors")
    before = (tmp_path / "photos.index.safetensors").read_bytes()
    cli.run(compose("checkpoint=tiny.safetensors", "images=photos"))
    assert (tmp_path / "photos.index.safetensors").read_bytes() == before
    assert "photos.index.safetensors" in capsys.readouterr().out

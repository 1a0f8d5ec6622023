"""Words on the command line that name no key: whatever they hold, they arrive as they were typed."""

import shlex
from importlib import import_module
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from coca_lit.cli.arguments import to_overrides
from coca_lit.cli.command import CONF
from coca_lit.errors import ConfigError

HOSTILE = [
    *("a b.jpg", "a,b.jpg", "=", "null", "10", "[x]", "{a,b}", "/data/{0..3}.tar", "x/y=1/2.jpg", "*.tar", "~x", ""),
    *("quote\"s'", "back\\slash\\", '\\"', "new\nline\t", "${oc.env:HOME}", "\\${x}", "${", "ü", "\udcff", " lead "),
]


def composed(tmp_path: Path, *overrides: str) -> dict:
    (tmp_path / "conf").mkdir(exist_ok=True)
    (tmp_path / "conf" / "c.yaml").write_text("images: []\nindex: null\nquery: null\nk: 1\n")
    with hydra.initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("c", list(overrides)), resolve=True)


def test_words_become_a_list(tmp_path: Path) -> None:
    words = [word for word in HOSTILE if word != ""]
    found = composed(tmp_path, *to_overrides(["k=2", *words, "index=i"], "images"))
    assert found == {"images": words, "index": "i", "query": None, "k": 2}


@pytest.mark.parametrize("word", HOSTILE)
def test_words_become_the_values_of_keys(word: str, tmp_path: Path) -> None:
    found = composed(tmp_path, *to_overrides(["folder", "k=3", word], ("index", "query")))
    assert found == {"images": [], "index": "folder", "query": word, "k": 3}


def test_file_called_like_an_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("k=2.jpg").touch()
    assert to_overrides(["k=2.jpg", "k=2"], "images") == ["k=2", 'images=["k=2.jpg"]']
    assert to_overrides(["k=3", "--", "k=3", "-x.jpg"], "images") == ["k=3", 'images=["k=3","-x.jpg"]']


def test_flags_and_their_values_stay() -> None:
    assert to_overrides(["--cfg", "job", "a.jpg", "-m"], "images") == ["--cfg", "job", "-m", 'images=["a.jpg"]']
    assert to_overrides(["--help"], "images") == ["--help"]


def test_a_word_too_many() -> None:
    with pytest.raises(ConfigError, match=r"^expected INDEX and QUERY and key=value, found also 'dog': quote a text"):
        to_overrides(["photos", "a", "dog"], ("index", "query"))


@pytest.mark.parametrize(("command", "positional"), [("caption", "images"), ("search", ("index", "query"))])
def test_examples_of_help_compose(command: str, positional: str | tuple[str, ...]) -> None:
    import_module(f"coca_lit.cli.{command}")  # registers its schema
    lines = yaml.safe_load((CONF / "hydra" / "help" / f"{command}.yaml").read_text())["template"].splitlines()
    examples = [line.strip().split("    ")[0] for line in lines if line.startswith(("  coca-", "  torchrun"))]
    assert len(examples) > 3
    for example in examples:
        words = shlex.split(example)
        start = 4 if words[0] == "torchrun" else 1
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose(command, to_overrides(words[start:], positional))
        assert cfg.checkpoint == "last.ckpt" or "my_run" in cfg.checkpoint

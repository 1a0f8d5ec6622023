"""Words on the command line that name no key arrive exactly as typed."""

import re
import shlex
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from coca_lit.cli import command
from coca_lit.cli.command import CONF, compose
from coca_lit.cli.words import parse, to_override
from coca_lit.errors import ConfigError, DataError
from coca_lit.tools.caption import command as caption_command  # noqa: F401  registers the options of generation
from coca_lit.tools.prepare.subcommand import SubcommandParser
from coca_lit.weights.hub import released
from helpers.running import CONFIGS

HOSTILE = [
    *("a b.jpg", "a,b.jpg", "=", "null", "10", "[x]", "{a,b}", "/data/{0..3}.tar", "x/y=1/2.jpg", "*.tar", "~x"),
    *("quote\"s'", "back\\slash\\", '\\"', "new\nline\t", "${oc.env:HOME}", "\\${x}", "${", "ü", "\udcff", " lead "),
]


def composed(tmp_path: Path, *overrides: str) -> dict:
    (tmp_path / "conf").mkdir(exist_ok=True)
    (tmp_path / "conf" / "c.yaml").write_text("images: []\nindex: null\nquery: null\nk: 1\n")
    with hydra.initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("c", list(overrides)), resolve=True)


def test_words_become_a_list(tmp_path: Path) -> None:
    found = composed(tmp_path, *parse(["k=2", *HOSTILE, "index=i"], "images")[1])
    assert found == {"images": HOSTILE, "index": "i", "query": None, "k": 2}


@pytest.mark.parametrize("word", ["", "\\${x}"])
def test_words_become_the_values_of_keys(word: str, tmp_path: Path) -> None:
    found = composed(tmp_path, *parse(["folder", "k=3", word], ("index", "query"))[1])
    assert found == {"images": [], "index": "folder", "query": word, "k": 3}


def test_words_go_to_the_keys_that_are_not_named() -> None:
    assert parse(["index=i", "a dog"], ("index", "query"))[1] == ["index=i", 'query="a dog"']
    with pytest.raises(ConfigError, match=r"QUERY.*'a dog'"):
        parse(["index=i", "folder", "a dog"], ("index", "query"))


def test_file_called_like_an_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("k=2.jpg").touch()
    assert parse(["k=2.jpg", "k=2"], "images")[1] == ["k=2", 'images=["k=2.jpg"]']
    assert parse(["k=3", "--", "k=3", "-x.jpg"], "images")[1] == ["k=3", 'images=["k=3","-x.jpg"]']


def test_options_and_their_values_stand_anywhere() -> None:
    options, overrides = parse(["--cfg", "job", "a.jpg", "-m"], "images")
    assert (options.cfg, options.multirun, overrides) == ("job", True, ['images=["a.jpg"]'])
    options, overrides = parse(["seed=1", "--config-dir", str(CONF), "-m"])
    assert overrides == ["seed=1", f'hydra.searchpath=["file://{CONF}"]']


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--zzz"], "--zzz"),
        (["--config-dir", "nowhere"], "nowhere"),
        (["photos"], "photos"),
        (["--config-dir", ".", "hydra.searchpath=[file://b]"], r"hydra\.searchpath=\[file://A,file://B\]"),
    ],
)
def test_what_is_no_option_and_no_override(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(words)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("päth/модель.ckpt", "päth/модель.ckpt"),
        ("{a: été, b: 2}", {"a": "été", "b": 2}),
        ("s3://bücket/{0..1}.tar", "s3://bücket/{0..1}.tar"),
        ("/a/{00000..41455}.tar", "/a/{00000..41455}.tar"),
        ('"/a/{0..1}.tar"', "/a/{0..1}.tar"),
        ("['/a/{0..1}.tar',/b/{0..1}.tar]", ["/a/{0..1}.tar", "/b/{0..1}.tar"]),
        ("{x: s3://b/{0..3}.tar, y: /c/{0..1}.tar}", {"x": "s3://b/{0..3}.tar", "y": "/c/{0..1}.tar"}),
        ("photo (1).jpg", "photo (1).jpg"),
        ("step=3.ckpt", "step=3.ckpt"),
        ("/a/*.tar", "/a/*.tar"),
    ],
)
def test_values_need_no_second_quotes(tmp_path: Path, typed: str, value: object) -> None:
    assert composed(tmp_path, to_override(f"query={typed}"))["query"] == value


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("~/x", "/my home/x"),
        ("[~/x,~/y/{0..1}.tar]", ["/my home/x", "/my home/y/{0..1}.tar"]),
        ("'~/x'", "~/x"),
        ("a~/x", "a~/x"),
        ("~x/y", "~x/y"),
    ],
)
def test_the_home_that_a_shell_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, value: object
) -> None:
    monkeypatch.setenv("HOME", "/my home")
    assert composed(tmp_path, *parse([f"query={typed}"])[1])["query"] == value
    words = SubcommandParser()
    words.add_argument("--in-shards")
    assert words.parse_args(["in_shards=~/x"]).in_shards == "/my home/x"


@pytest.mark.parametrize("name", ["2024_01_05", "007", "1e5", "null", "runs/1"])
def test_the_name_of_a_run_is_text(name: str) -> None:
    assert compose("train", [to_override(f"name={name}")]).name == name


@pytest.mark.parametrize("folder", ["2024", "Berlin, Mai 2024"])
def test_a_folder_that_looks_like_a_number_or_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    assert compose("train", ["experiment=my_photos", to_override(f"data.root={folder}")]).data.root == folder
    roots = [to_override(f"{key}={folder}") for key in ("checkpoint", "roots.mscoco", "+evals.mine.records.root")]
    cfg = compose("evaluate", roots)
    assert (cfg.checkpoint, cfg.roots.mscoco, cfg.evals.mine.records.root) == (folder,) * 3
    share = r"\\nas\share\photos"  # of Windows
    assert compose("train", ["experiment=my_photos", to_override(f"data.root={share}")]).data.root == share


def test_years_in_a_list_and_in_a_sweep_are_folders() -> None:
    assert compose("train", ["experiment=pretrain_b32", to_override("data.shards=[2023, 2024]")]).data.shards == [
        "2023",
        "2024",
    ]
    (sweep,) = OverridesParser.create().parse_overrides([to_override("data.root=2023,2024")])
    assert [place.text for place in sweep.value().list] == ["2023", "2024"]
    cfg = compose("train", ["experiment=pretrain_b32", to_override("data.shards=[2024]")])
    assert cfg.data.shards == ["2024"]
    assert to_override("data.shards=[2023,a/1.tar]") == 'data.shards=["2023",a/1.tar]'
    assert to_override("data.shards=[Photos 2024,DCIM 100]") == "data.shards=[Photos 2024,DCIM 100]"
    assert to_override("seed=2023,2024") == "seed=2023,2024"
    assert to_override("init_from=false") == "init_from=false"
    cfg = compose("caption", [to_override("images=[größe,2024]")])
    assert cfg.images == ["größe", "2024"]
    (sweep,) = OverridesParser.create().parse_overrides([to_override("init_from=größe/a,2024")])
    assert [place.text for place in sweep.value().list] == ["größe/a", "2024"]


@pytest.mark.parametrize("text", ["lr=0.1,seed=1", "lr=0.1,5,x", "two dogs, running!", "a man & a woman, 2 dogs"])
def test_a_text_with_a_comma_that_no_list_could_hold_is_one_text(text: str) -> None:
    assert compose("search", [to_override(f"query={text}")]).query == text
    assert compose("train", [to_override(f"name={text}")]).name == text
    assert compose("train", [to_override("name=a\\,5")]).name == "a,5"


@pytest.mark.parametrize(("word", "said"), [("[a", "query='\"[a\"'"), ("{a: 1", "query='\"{a: 1\"'")])
def test_what_is_not_in_the_grammar(monkeypatch: pytest.MonkeyPatch, word: str, said: str) -> None:
    monkeypatch.setattr("sys.argv", ["coca-search", f"query={word}", "index=x", "checkpoint=x"])
    with pytest.raises(SystemExit) as exit:
        command.command("search", lambda cfg: None)
    assert said in str(exit.value.code)
    assert "^" not in str(exit.value.code)


def test_errors_hold_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cfg: DictConfig) -> None:
        raise DataError("a\x1b[2Jb")

    monkeypatch.setattr("sys.argv", ["coca-search", "query=a", "index=x", "checkpoint=photos"])
    with pytest.raises(SystemExit, match=r"^error: a\\x1b\[2Jb$"):
        command.command("search", fail)


@pytest.mark.slow
def test_help_lists_the_users_experiments_by_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    mine = "# @package _global_\n# My model on\n# my data: details.\n# Task: caption finetuning\ndefaults: [demo]\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    (tmp_path / "experiment" / "bare.yaml").write_text("# @package _global_\nseed: 1\n")
    for how in (["--config-dir", str(tmp_path)], [f"hydra.searchpath=[file://{tmp_path}]"]):
        monkeypatch.setattr("sys.argv", ["coca-train", "--help", *how])
        command.job_command("train", lambda cfg: None)
        lines = capsys.readouterr().out.splitlines()
        start = lines.index("  caption finetuning")
        assert "    mine                      My model on my data" in lines[start : start + 6]
        assert lines[lines.index("  others") + 1].strip() == "bare"


def test_help_of_evaluations_lists_them_and_no_other_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["coca-evaluate", "--help"])
    command.job_command("evaluate", lambda cfg: None)
    shown = capsys.readouterr().out
    names = re.findall(r"[\w]+", shown.partition("\nevals: ")[2].partition("\nSingle values")[0])
    files = {file.stem for folder in CONFIGS for file in folder.glob("evals/[!_]*.yaml")}
    data = {file.stem for folder in CONFIGS for file in folder.glob("data/[!_]*.yaml")}
    assert {"mscoco", "my_photos"} <= data - files  # which need none
    assert sorted(names) == sorted(files | data)
    assert "logger: " not in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "positional"),
    [("train", ()), ("caption", "images"), ("search", ("index", "query")), ("plan", ()), ("export", ())],
)
def test_examples_of_help_compose(command: str, positional: str | tuple[str, ...]) -> None:
    lines = yaml.safe_load((CONF / "hydra" / "help" / f"{command}.yaml").read_text())["template"].splitlines()
    starts = ("  coca-", "  torchrun", "  python train.py")
    examples = [line.strip().split("    ")[0] for line in lines if line.startswith(starts)]
    assert len(examples) > 2
    for example in examples:
        words = shlex.split(example)
        start = {"torchrun": 4, "python": 2}.get(words[0], 1)
        options, overrides = parse(words[start:], positional)
        cfg = compose(command, [o.partition(",")[0] for o in overrides] if options.multirun else overrides)
        named = cfg.get("checkpoint")
        assert named is None or named.endswith(".ckpt") or named in ("outputs/my_run", "photos") or released(named)
        assert named is not None or command != "export"


@pytest.mark.parametrize(("program", "typed"), [("/bin/coca-train", "coca-train"), ("train.py", "python train.py")])
def test_the_help_names_the_command_that_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str, typed: str
) -> None:
    monkeypatch.setattr("sys.argv", [program, "--help"])
    command.job_command("train", lambda cfg: None)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(f"  {typed} ") for line in lines) == 8
    assert not any("python train.py" in line for line in lines if typed == "coca-train")

"""Projects of an installed package: found without importing it, and left out with one sentence if they are broken."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = """\
about = "Counts things."
text_keys = ["data.ledger"]
[roots]
things = "${data_dir}/things"
[text_towers]
counting = "outsider.idea.tower:Tower"
[scores]
counted = { title = "things counted, %", share = true }
missed = { title = "things missed", lower_is_better = true }
[sample_steps]
ledger = { step = "outsider.idea.tower:counted", help = "folder of counts" }
[batch_sizes]
growing = { schedule = "outsider.idea.tower:Growing", help = "sizes of batches" }
[commands.data]
count = { run = "outsider.idea.tower:count", help = "count things" }
"""
EXPERIMENT = "# @package _global_\n# Counts. More.\n# Task: counting\nseed: 7\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages with one that has a project, whose import fails."""
    package = tmp_path / "outsider" / "idea"
    (package / "conf" / "experiment").mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "__init__.py").touch()
    (package / "project.toml").write_text(MANIFEST)
    (package / "conf" / "experiment" / "counted.yaml").write_text(EXPERIMENT)
    add_entry(tmp_path, "outsider", "idea = outsider.idea")
    return tmp_path


def add_entry(site: Path, distribution: str, line: str) -> None:
    info = site / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[coca_lit.projects]\n{line}\n")


def python(site: Path, program: str) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.insert(0, {str(site)!r})\nfrom coca_lit import extensions\n"
    return subprocess.run([sys.executable, "-c", start + program], cwd=ROOT, capture_output=True, text=True)


def train(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return python(
        site, f"sys.argv = ['coca-train', *{words!r}]\nfrom coca_lit.cli import train_command\ntrain_command()"
    )


def test_what_a_project_adds_is_known_without_an_import(site: Path) -> None:
    """Text towers, and arguments that plan sizes of batches or name steps for samples. The values of these are texts if
    the project says so, also a folder of a year.
    """
    program = """
from coca_lit.cli.schema import read_signature
from coca_lit.cli.words import to_override
print(extensions.declared("text_towers")["counting"], extensions.sample_steps()["ledger"].step)
for name in ("shards.laion.LAIONDataModule", "datamodule.ScenesDataModule", "datamodule.RecordsDataModule"):
    print("growing" in read_signature(f"coca_lit.data.{name}").arguments)
print("ledger" in read_signature("coca_lit.data.shards.laion.LAIONDataModule").arguments)
print(*map(to_override, ("data.ledger=2024", "+data.ledger=2024", "data.other=2024")))
print("outsider" in sys.modules)
"""
    assert python(site, program).stdout.splitlines() == [
        "outsider.idea.tower:Tower outsider.idea.tower:counted",
        *["True"] * 4,
        'data.ledger="2024" +data.ledger="2024" data.other=2024',
        "False",
    ]


def test_names_of_scores_say_what_they_mean(site: Path) -> None:
    program = """
from coca_lit.metrics import is_share, lower_is_better
from coca_lit.runs.scores import cell, score_name
for score in ("x/counted", "x/missed", "x/other"):
    print(score_name(score), cell(score, 0.5), is_share(score), lower_is_better(score))
"""
    expected = ["things counted, % 50.00 True False", "things missed 0.5000 False True", "other 0.5000 False False"]
    assert python(site, program).stdout.splitlines() == expected


def test_configs_roots_and_help_are_found_without_an_import(site: Path) -> None:
    done = train(site, "experiment=counted", "data_dir=/d", "--cfg", "job", "--resolve")
    assert "seed: 7\n" in done.stdout, done.stderr
    assert "things: /d/things\n" in done.stdout
    listed = train(site, "--help").stdout
    assert "  counting\n    counted                   Counts\n" in listed
    assert listed.endswith(
        "Added by installed packages\n  idea (from the package outsider): Counts things.\n    experiment=counted\n"
    )


def test_a_folder_of_the_user_is_searched_beside_those_of_projects(site: Path, tmp_path: Path) -> None:
    own = tmp_path / "own folder" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\nseed: 8\n")
    for words in (("--config-dir", str(own.parent)), (f"hydra.searchpath=['file://{own.parent}']",)):
        for experiment, seed in (("mine", 8), ("counted", 7)):
            done = train(site, *words, f"experiment={experiment}", "--cfg", "job")
            assert f"seed: {seed}\n" in done.stdout, done.stderr


COMMANDS = """
from coca_lit.tools.prepare.command import data
for words in (["count", "check", "engine=gpus"], ["engine=local", "count"], ["prepare", "count", "spice"]):
    try:
        data(words)
    except SystemExit as error:
        print(error)
"""


def test_a_subcommand_of_a_project_is_listed_and_gets_its_words(site: Path) -> None:
    """One that the tool has itself, or a word that is no subcommand, is none of the project's."""
    (site / "counting.py").write_text("def count(words): print('counted', words)")
    manifest = MANIFEST.replace("outsider.idea.tower:count", "counting:count")
    (site / "outsider" / "idea" / "project.toml").write_text(
        f'{manifest}\nprepare = {{ run = "counting:count", help = "never" }}'
    )
    listed = python(site, "from coca_lit.tools.prepare.command import data\ndata(['--help'])").stdout
    assert "    count     count things\n" in listed
    assert "never" not in listed
    done = python(site, COMMANDS).stdout.splitlines()
    assert done[:2] == ["counted ['count', 'check', 'engine=gpus']", "counted ['count', 'engine=local']"]
    assert "count" in done[2]
    assert done[2].startswith("error: ")


def test_a_subcommand_whose_code_is_missing_is_one_sentence(site: Path) -> None:
    (site / "outsider" / "__init__.py").write_text("")
    done = python(site, "from coca_lit.tools.prepare.command import data\ndata(['count'])")
    assert done.stderr.startswith("error: there is no 'outsider.idea.tower:count'")
    assert done.stderr.count("\n") == 1


def test_an_option_is_found_at_any_place_and_a_subcommand_at_the_first(site: Path) -> None:
    (site / "counting.py").write_text("def count(words): pass\ndef draw(words): pass")
    (site / "outsider" / "idea" / "project.toml").write_text(
        """about = "x"
[commands.report]
count = { run = "counting:count", help = "count" }
"--draw" = { run = "counting:draw", help = "draw" }
"""
    )
    program = """
from coca_lit.tools.commands import command_for
for words in (["count", "a"], ["a", "count"], ["a", "--draw", "b"], ["--draw=b"], ["draw"]):
    found = command_for("report", words)
    print(found and found.__name__)
"""
    assert python(site, program).stdout.split() == ["count", "None", "draw", "draw", "None"]


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("about = 'x'\nrots = 1", "has no argument 'rots'; did you mean 'roots'?"),
        ("[roots]", "lacks the key 'about'"),
        ("about = 'x'\n[scores]\nright = { tilte = 'x' }", "unexpected keyword argument 'tilte'"),
        ("about = 'x'\n[scores]\nright = { share = true }", "title"),
        ("about =", "Invalid value"),
        ("about = 'x'\nrequires = ['another']", "it requires the project 'another'"),
        ("about = 'x'\n[text_towers]\ncounting = 'a:b'", "'counting' of its text_towers is also the name of one"),
        ("about = 'x'\n[commands.data]\na = {run = 'b:c'}", "'a' of [commands.data]:"),
        ("about = 'x'\n[commands.data]\ncount = {run = 'b:c', help = 'd'}", "'count' of its commands.data is also"),
        ("about = 'x'\n[sample_steps]\na = {step = 'b:c'}", "missing 1 required positional argument: 'help'"),
        ("about = 'x'\n[batch_sizes]\na = {help = 'b'}", "'a' of [batch_sizes]:"),
        ("about = 'x'\n[sample_steps]\nledger = {step = 'b:c', help = 'd'}", "'ledger' of its sample_steps is also"),
        (None, "project.toml"),
    ],
)
def test_a_broken_project_costs_one_sentence(site: Path, manifest: str | None, reason: str) -> None:
    broken = site / "broken"
    broken.mkdir()
    if manifest is not None:
        (broken / "project.toml").write_text(manifest)
    add_entry(site, "zbroken", "worse = broken")
    done = python(site, "print(*(project.name for project in extensions.projects() if not project.is_own))")
    assert done.stdout == "idea\n"
    assert done.stderr.startswith("note: the project 'worse' of the package 'zbroken' is left out: ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_requires_a_project_that_is_left_out_is_left_out_too(site: Path) -> None:
    for name, required in (("first", "second"), ("second", "third")):
        (site / name).mkdir()
        (site / name / "project.toml").write_text(f"about = 'x'\nrequires = ['{required}']")
        add_entry(site, f"of_{name}", f"{name} = {name}")
    done = python(site, "print(*(project.name for project in extensions.projects() if not project.is_own))")
    assert done.stdout == "idea\n"
    assert [line.rpartition(" ")[2] for line in done.stderr.splitlines()] == ["'third'", "'second'"]


def test_what_is_missing_says_where_it_is_to_be_had(site: Path) -> None:
    program = """
for target in ("coca_lit.projects.gone.x:Y", "outsider.nothing:Y"):
    try:
        extensions.load(target)
    except extensions.ConfigError as error:
        print(error)
"""
    first, second = python(site, program.replace("outsider.", "absent.")).stdout.splitlines()
    assert first.endswith("; the project 'gone' is not installed. It comes with the package coca_lit")
    assert "package coca_lit" not in second


PARTS = """\
from coca_lit.models.poolers import SinglePooling
from coca_lit.models.text import TextTower


class Pooler(SinglePooling):
    pass


class Tower(TextTower):
    pass


PRESETS = {"outsider_tiny": {
    "image_encoder": "resnet10t", "image_encoder_args": {"channels": [8, 8, 8, 8]}, "image_size": 32, "embed_dim": 16,
    "pooler": "counting_pooler", "pooler_queries": 3, "pooler_heads": 2, "tokenizer": "numbers", "context_length": 8,
    "text_tower": "counting", "text_width": 16, "text_layers": 1, "text_heads": 2, "decoder_layers": 1,
}}
WORDS = ["one", "two"]
"""
DECLARED = """\
about = "Counts things."
[text_towers]
counting = "outsider.idea.parts:Tower"
[poolers]
counting_pooler = "outsider.idea.parts:Pooler"
[vocabularies]
numbers = "outsider.idea.parts:WORDS"
[presets]
module = "outsider.idea.parts:PRESETS"
names = ["outsider_tiny"]
"""


def test_a_model_of_declared_parts_is_built_by_its_name_and_loaded_without_imports(site: Path) -> None:
    package = site / "outsider" / "idea"
    (package.parent / "__init__.py").write_text("")
    (package / "parts.py").write_text(PARTS)
    (package / "project.toml").write_text(DECLARED)
    build = """
import coca_lit
model = coca_lit.create_model("Outsider-Tiny")
coca_lit.save_model(model, sys.path[0] + "/model.safetensors")
"""
    assert python(site, build).stderr == ""
    load = """
import coca_lit
model = coca_lit.load_model(sys.path[0] + "/model.safetensors")
print(type(model.text).__module__, type(model.pooling).__name__, model.config.text_tower, model.tokenizer.spec)
"""
    done = python(site, load)
    assert done.stdout == "outsider.idea.parts Pooler outsider.idea.parts:counting ['one', 'two']\n", done.stderr

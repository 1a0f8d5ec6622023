"""No secret stands in what a run prints and writes."""

import json
import logging
import re
import time

import pytest
import yaml

from coca_lit.runs.redaction import SecretFilter, mask, redact
from coca_lit.runs.run_folder import start_run_folder
from helpers.running import compose, train_py


@pytest.mark.slow
def test_no_secret_in_what_a_run_prints_and_writes(tmp_path, monkeypatch):
    secrets = {"WANDB_API_KEY": "from-environment-1", "HF_TOKEN": "from-environment-2"}
    arguments = (
        *("trainer=smoke", "name=x", "++model.net.image_encoder_args.token=typed-3"),
        "++model.net.image_encoder_args.note=${oc.env:HF_TOKEN}",
        "++model.net.image_encoder_args.deep={api_key:typed-4,password:${oc.env:WANDB_API_KEY}}",
        "data.cache_dir=https://me:typed-5@host/x",
    )
    printed = train_py(*arguments, "--cfg", "job", "--resolve", cwd=tmp_path, **secrets)
    shown = yaml.safe_load(printed.stdout)
    encoder = shown["model"]["net"]["image_encoder_args"]
    hidden = [encoder["token"], encoder["note"], *encoder["deep"].values()]
    assert (shown["model"]["net"]["name"], hidden) == ("coca_tiny", ["<hidden>"] * 4)
    stopped = train_py(*arguments, "++model.net.note=${oc.env:HF_TOKEN}", cwd=tmp_path, **secrets)
    (said,) = stopped.stderr.splitlines()
    assert said.startswith("error: ")
    assert "note" in said
    for name, value in secrets.items():  # what a run that starts writes
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    start_run_folder(compose(*arguments, f"output_dir={tmp_path}/outputs/x"))
    written = {path.name: path.read_text() for path in (tmp_path / "outputs").rglob("*") if path.is_file()}
    assert {"config.yaml", "environment.json"} <= set(written)
    assert "token=<hidden>" in json.loads(written["environment.json"])["command"]
    assert yaml.safe_load(written["config.yaml"])["model"]["net"]["image_encoder_args"]["note"] == "${oc.env:HF_TOKEN}"
    everything = "".join([printed.stdout, printed.stderr, stopped.stdout, stopped.stderr, *written.values()])
    assert not re.search(r"from-environment|typed-", everything)
    twice = "++model.net.image_encoder_args.token=typed-6,typed-7"  # which the message repeats
    wrong = train_py(twice, "name=x", cwd=tmp_path)
    assert wrong.stderr.startswith("error: ")
    assert "typed-" not in wrong.stderr


@pytest.mark.slow
def test_no_secret_of_a_sweep(tmp_path):
    """In Hydra's record, the log lines of its launcher, our records, and names of folders."""
    words = ("-m", "seed=1,2", "++model.net.image_encoder_args.token=typed-1", "model.net.name=nothing")
    done = train_py(*words, "hydra.sweep.subdir=${seed}", cwd=tmp_path)
    assert done.returncode == 1
    assert "succeeded: model.net.name: unknown model 'nothing'" in done.stderr
    assert "#1 : ++seed=2 ++model.net.image_encoder_args.token=<hidden>" in done.stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert {"multirun.yaml", "job.json", "error.txt", "results.csv"} <= {path.name for path in files}
    everything = "".join([done.stdout, done.stderr, *map(str, files), *(path.read_text() for path in files)])
    assert "typed-1" not in everything


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *(
            (f"{name}=x1", f"{name}=<hidden>")
            for name in (
                *("api_key", "api-key", "accessToken", "auth", "passphrase", "GITHUB_PAT", "a.b.password", "db_pwd"),
                *("PGPASSWORD", "credentials", "private_key", "signing-key", "encryption_key", "secret", "token"),
            )
        ),
        *(
            (text, text)
            for text in ("tokenizer=x", "caption_tokens: 20", "author=me", "compat=1", "no_repeat_ngram: 3")
        ),
        ("token=${oc.env:HF_TOKEN}", "token=${oc.env:HF_TOKEN}"),
        ("s3://user:pass@host/x", "s3://user:<hidden>@host/x"),
        ('{"api_key": "a, b"}', '{"api_key": "<hidden>"}'),
        ("Authorization: Bearer abc", "Authorization: <hidden>"),
        ("https://host/x?token=abc&y=1", "https://host/x?token=<hidden>&y=1"),
        ("['x.api_key=a', 'seed=1']", "['x.api_key=<hidden>', 'seed=1']"),
        (
            "https://b.s3.amazonaws.com/x.tar?X-Amz-Credential=AK/1/s3&X-Amz-Expires=60&X-Amz-Signature=ab12",
            "https://b.s3.amazonaws.com/x.tar?X-Amz-Credential=<hidden>&X-Amz-Expires=60&X-Amz-Signature=<hidden>",
        ),
        (
            "https://a.blob.core.windows.net/x?sv=2&sig=a%2Fb%3D&se=3",
            "https://a.blob.core.windows.net/x?sv=2&sig=<hidden>&se=3",
        ),
        ("https://host/x?key=AIza&sig=", "https://host/x?key=<hidden>&sig="),
        ("--password abcdefgh --seed 1", "--password <hidden> --seed 1"),
        ("['--api-key', 'abc', '--seed', '1']", "['--api-key', '<hidden>', '--seed', '1']"),
        ("--password=abc --seed 1", "--password=<hidden> --seed 1"),
        ("--token --verbose", "--token --verbose"),
        ("postgresql://user:pa/ss@host/db", "postgresql://user:<hidden>@host/db"),
        ("https://me@x.org:pw@host/x", "https://me@x.org:<hidden>@host/x"),
        ("s3://u:p@h/a,s3://u:p@h/b", "s3://u:<hidden>@h/a,s3://u:<hidden>@h/b"),
        ("http://host:9000/x@2 hf://datasets/a/b@main", "http://host:9000/x@2 hf://datasets/a/b@main"),
        ("password=a b c", "password=<hidden>"),
        ("++db.password=a b c ++seed=2 --x", "++db.password=<hidden> ++seed=2 --x"),
    ],
)
def test_names_of_secrets(text, shown):
    assert redact(text) == shown


def test_the_shell_names_its_folder_like_a_password(monkeypatch):
    monkeypatch.setenv("PWD", "/home/me/work")
    monkeypatch.setenv("OLDPWD", "/home/me/data")
    monkeypatch.setenv("MYSQL_PWD", "hunter2")
    assert redact("/home/me/work/a /home/me/data/b hunter2") == "/home/me/work/a /home/me/data/b <hidden>"


def test_values_of_typed_flags_are_hidden_wherever_they_occur(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--password", "hunter22", "--db-token=hunter33", "--seed", "1234567"])
    assert redact("hunter22 hunter33 1234567") == "<hidden> <hidden> 1234567"


def test_log_records_hold_no_control_characters():
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s\n\ttoken=%s", ("a\x1b[2Jb\r", "x1"), None)
    assert SecretFilter().filter(record)
    assert record.getMessage() == "a\\x1b[2Jb\\x0d\n\ttoken=<hidden>"


def test_everything_under_a_secret_name_is_one():
    config = {"auth": {"user": "me", "pin": 12, "key": "${oc.env:KEY}"}, "urls": ["s3://me:pw@host"], "token": None}
    masked = {"user": "<hidden>", "pin": "<hidden>", "key": "${oc.env:KEY}"}
    assert mask(config) == {"auth": masked, "urls": ["s3://me:<hidden>@host"], "token": None}


def test_a_long_path_takes_no_longer():
    began = time.process_time()
    for part in ("a/", "a.", "/-", "a+", "a@b/", "pwd="):
        redact(part * 8000)
    assert time.process_time() - began < 3

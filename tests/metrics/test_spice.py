"""SPICE's call of Java, with a stand-in for the program: the jars that it needs cannot be shipped."""

import json
import sys
import textwrap

import pytest

from coca_lit.metrics.captions import caption_scores, caption_table
from coca_lit.metrics.java import spice as module
from coca_lit.metrics.java.spice import JARS, SpiceError, spice


@pytest.fixture
def jars(tmp_path, monkeypatch):
    for name in JARS:
        (tmp_path / name).touch()
    monkeypatch.setenv("COCA_SPICE_JARS", str(tmp_path))
    return tmp_path


def replacement(folder, monkeypatch, body):
    """Puts a Python program in the place of Java; it finds its arguments in `args`."""
    program = folder / "java"
    lines = [f"#!{sys.executable}", "import json, sys, time", "args = sys.argv[1:]", textwrap.dedent(body)]
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    monkeypatch.setattr(module, "java_executable", lambda: program)


def test_score_of_each_image(jars, monkeypatch):
    body = """
        at = args.index("edu.anu.spice.SpiceScorer")
        rows = json.load(open(args[at + 1]))
        rows.reverse()
        scores = [{"image_id": r["image_id"], "scores": {"All": {"f": len(r["refs"]) / 10}}} for r in rows]
        assert [row["test"] for row in rows] == ["a cat", "a dog"]
        json.dump(scores, open(args[args.index("-out") + 1], "w"))
        json.dump(args, open("{folder}/args.json", "w"))
    """.replace("{folder}", str(jars))
    replacement(jars, monkeypatch, body)
    references, captions = {"x": ["x", "y"], "z": ["z"]}, {"x": ["a dog"], "z": ["a cat"]}
    assert spice(references, captions) == pytest.approx([0.2, 0.1])
    args = json.loads((jars / "args.json").read_text())
    assert sum(arg.startswith("--add-opens=java.base/java.") for arg in args) == 6
    assert str(jars / "*") in args[args.index("-cp") + 1]
    single = {image: texts[0] for image, texts in captions.items()}
    assert caption_scores(references, single, ["SPICE"], list) == pytest.approx({"SPICE": 0.15})


def test_one_run_serves_all_domains(jars, monkeypatch):
    body = """
        rows = json.load(open(args[args.index("-out") - 1]))
        open("{folder}/runs", "a").write("x")
        scores = [{"image_id": r["image_id"], "scores": {"All": {"f": [0.3, 0.1, 0.2][r["image_id"]]}}} for r in rows]
        json.dump(scores, open(args[args.index("-out") + 1], "w"))
    """.replace("{folder}", str(jars))
    replacement(jars, monkeypatch, body)
    domains = {"a": "near", "b": "far", "c": "near"}
    scores, not_run = caption_table({i: ["x y"] for i in "abc"}, dict.fromkeys("abc", "x"), domains, ["Bleu"], list)
    assert (scores["SPICE"], scores["far/SPICE"], scores["near/SPICE"]) == pytest.approx((0.2, 0.1, 0.25))
    assert not_run == {}
    assert (jars / "runs").read_text() == "x"


def test_failure_and_time_limit(jars, monkeypatch):
    replacement(jars, monkeypatch, "sys.exit('no models')")
    with pytest.raises(SpiceError, match=r"exit status 1\): no models"):
        spice({0: ["x"]}, {0: ["x"]})
    replacement(jars, monkeypatch, "time.sleep(60)")
    monkeypatch.setattr(module, "START_LIMIT_S", -0.8)
    with pytest.raises(SpiceError, match="did not finish"):
        spice({0: ["x"]}, {0: ["x"]})


def test_missing_jars_say_how_to_get_them(jars, monkeypatch):
    (jars / JARS[1]).unlink()
    with pytest.raises(
        SpiceError, match=r"where stanford-corenlp-3\.6\.0-models\.jar is missing: unpack .* COCA_SPICE"
    ):
        caption_scores({0: ["x"]}, {0: "x"}, ["SPICE"])
    monkeypatch.delenv("COCA_SPICE_JARS")
    with pytest.raises(SpiceError, match="no Python package carries"):
        spice({0: ["x"]}, {0: ["x"]})


def test_other_scores_come_without_spice(monkeypatch):
    monkeypatch.delenv("COCA_SPICE_JARS", raising=False)
    scores, not_run = caption_table({0: ["a red dog"]}, {0: "a red dog"}, metrics=["Bleu"], tokenize=list)
    assert scores["Bleu_1"] == pytest.approx(1)
    assert "SPICE" not in scores
    assert "COCA_SPICE_JARS" in not_run["SPICE"]

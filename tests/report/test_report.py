"""Reports from run folders: complete, self-contained, safe against what captions hold."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from coca_lit.cli.command import compose
from coca_lit.cli.report import report
from coca_lit.data.scenes.render import scene_records
from coca_lit.errors import DataError
from coca_lit.evals.samples import caption_samples, confusion_samples, retrieval_samples, thumbnail, worst_captions
from coca_lit.metrics.uncertainty import Draws, bootstrap, ratios
from coca_lit.report import figures
from coca_lit.report.figures import curves_figure, swept_value
from coca_lit.report.page import write_comparison, write_report
from coca_lit.report.runs import differences, find_runs, read_run
from coca_lit.report.scores import cell, headline, headlines_of, score_name
from coca_lit.report.tables import (
    comparison_tables,
    difference_table,
    print_jobs,
    runs_table,
    score_tables,
    seed_tables,
)
from coca_lit.runs.draws import write_draws

PNG = b"\x89PNG"


def make_run(folder, results, config="", **files):
    (folder / "samples").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(config or "name: x\n")
    for name, content in files.items():
        (folder / "samples" / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(tmp_path):
    records = scene_records("val", count=12)
    captions = {record.id: record.captions[0] for record in records} | {records[0].id: "<script>alert(1)</script> | x"}
    torch.manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(12, 4), dim=1)
    owner = torch.arange(12).repeat_interleave(5)
    results = {"mscoco/CIDEr": 1.2345, "mscoco/t2i_recall@1": 0.4, "nocaps/CIDEr": 0.9, "nocaps/in-domain/CIDEr": 1.0}
    folder = make_run(
        tmp_path / "run",
        results,
        "checkpoint: a.ckpt\nname: run\n",
        scenes_captions=caption_samples(records, captions),
        scenes_retrieval=retrieval_samples(records, images, images.roll(1, 0)[owner], owner),
    )
    values = np.linspace(1.18, 1.2753, 1000)
    values = np.clip(values, 1.19, 1.2655)
    write_draws(folder, {"mscoco/CIDEr": Draws(values, float(values.mean()), "x")})
    (folder / "environment.json").write_text(json.dumps({"parameters": {"image encoder": 1_500_000}}))
    (folder / "not_run.json").write_text(json.dumps({"SPICE": "no jars"}))
    (folder / "metrics.csv").write_text(
        "step,epoch,train/caption_loss,mscoco/CIDEr\n1,0,2.5,\n2,0,1.5,0.3\n3,1,1.2,0.4\n"
    )
    return folder


def test_page_needs_nothing_else(run):
    page = write_report(run).read_text()
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(sources) > 20
    assert all(source.startswith("data:image/") for source in sources)  # no checkpoint lies there
    assert "http" not in re.sub(r'src="[^"]+"', "", page)
    assert "<script>" not in page  # a caption is text, whatever it holds
    assert "&lt;script&gt;" in page
    for text in (
        "123.45",
        "SPICE",
        "no jars",
        "a.ckpt",
        "OpenCLIP CoCa B/32, LAION-2B",
        "36.18",
        "built-in scenes: retrieval",
        "the clearest mistakes",
        "306.72 M",
    ):
        assert text in page
    assert (run / "curves.png").read_bytes().startswith(PNG)


def test_markdown(run):
    write_report(run)
    text = (run / "report.md").read_text()
    assert "| CIDEr | 123.45 | \\[119.00, 126.55\\] |" in text
    assert "- SPICE: no jars" in text
    assert "![curves.png](curves.png)" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    first = rows[: next(i for i, line in enumerate(rows) if i > 1 and line.startswith("| --- |")) - 1]
    assert all(line.count("|") == rows[0].count("|") for line in first)


def test_names_from_anywhere_are_text(tmp_path):
    """In the page and in Markdown, where a name could be a script, a link, a heading or the end of a code span."""
    name = "<script>alert(1)</script>"
    folder = make_run(tmp_path / "run`s <b>", {f"{name}/CIDEr": 1.0, "[x](javascript:alert)/CIDEr": 0.5})
    (folder / "not_run.json").write_text(json.dumps({f"{name} SPICE": "no\n# jars <img src=x>"}))
    (folder / "environment.json").write_text(json.dumps({"command": "coca-train `<script>` name=``x", "machine": name}))
    (folder / "samples" / "a) <i>.png").write_bytes(PNG)
    page = write_report(folder).read_text()
    text = (folder / "report.md").read_text()
    assert "- command: ```coca-train `<script>` name=``x```" in text
    rest = text.replace("```coca-train `<script>` name=``x```", "")
    for shown in (page, rest):
        assert not re.search(r"<script>|<img src=x>|<i>", shown)
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "- &lt;script&gt;alert(1)&lt;/script&gt; SPICE: no # jars &lt;img src=x&gt;" in text
    assert "[x](" not in text.replace("\\[x\\](", "")
    assert "(samples/a%29%20%3Ci%3E.png)" in text


def test_tables(run):
    mscoco, nocaps, parameters = score_tables(read_run(run))
    assert mscoco.header[:3] == ["", "this run", "95 % interval"]
    cider = dict(zip(mscoco.header, next(row for row in mscoco.rows if row[0] == "CIDEr"), strict=True))
    assert cider["this run"] == "123.45"
    assert cider["95 % interval"] == "[119.00, 126.55]"
    assert cider["CoCa 2B, fine-tuned (paper), val split"] == "143.60"
    assert cider["coca_ViT-L-14, fine-tuned, val split"] == "125.30"
    assert "OpenCLIP CoCa report, Table 4 (coca_ViT-L-14, fine-tuned)" in mscoco.note
    assert nocaps.header == ["", "this run", "in-domain", "coca_ViT-L-14, fine-tuned", "CoCa 2B, fine-tuned (paper)"]
    assert nocaps.rows == [["CIDEr", "90.00", "100.00", "106.50", "122.40"]]
    assert parameters.header == ["", "this run", "coca_ViT-L-14", "coca_ViT-B-32", "CoCa (paper)"]
    assert parameters.rows[0] == ["image encoder", "1.50 M", "306.72 M", "89.16 M", "1,000.00 M"]


# Tables 2 and 4 of the report, its text on ImageNet, and what the CoCa paper has.
REPORTED = {
    "mscoco": {"Bleu_4": 35.6, "METEOR": 29.8, "CIDEr": 125.3, "SPICE": 23.4},
    "nocaps": {"Bleu_4": 39.9, "METEOR": 29.1, "CIDEr": 106.5, "SPICE": 14.7},
    "flickr30k": {"t2i_recall@5": 92.0, "i2t_recall@5": 99.3},
    "flickr8k": {"t2i_recall@5": 70.1, "i2t_recall@5": 81.7},
    "imagenet": {"top1": 75.5},
}
OTHERS = {
    "mscoco": {"Bleu_4": 40.9, "METEOR": 33.9, "CIDEr": 143.6, "SPICE": 24.7},
    "nocaps": {"CIDEr": 122.4, "SPICE": 15.5},
    "flickr30k": {"t2i_recall@5": 91.7, "i2t_recall@5": 98.4},
    "flickr8k": {"t2i_recall@5": 69.0, "i2t_recall@5": 81.2},
    "imagenet": {"top1": 73.1},
}


@pytest.mark.parametrize("data", REPORTED)
def test_published_scores_stand_beside_ours(tmp_path, data):
    ours = {f"{data}/{score}": 0.5 for score in REPORTED[data]}
    (table,) = score_tables(read_run(make_run(tmp_path / "run", ours, "scoring: {split: test}\n")))
    assert len(set(table.header)) == len(table.header)
    columns = list(zip(*[row for row in table.rows if len(row) > 1], strict=True))
    for expected in (REPORTED[data], OTHERS[data]):
        shown = tuple(f"{expected[score]:.2f}" if score in expected else "" for score in REPORTED[data])
        assert shown in columns
    assert table.note.startswith("Published: ")


def test_scores_of_a_test_split_stand_beside_those_of_a_test_split_alone(tmp_path):
    scores = {"flickr8k/t2i_recall@1": 0.2, "flickr8k/CIDEr": 0.5}
    for split, columns in (("val", 2), ("test", 2 + 10 + 4)):
        (table,) = score_tables(read_run(make_run(tmp_path / split, scores, f"scoring: {{split: {split}}}\n")))
        assert len(table.header) == columns


def test_two_runs_are_compared_by_the_paired_test(tmp_path):
    random = np.random.default_rng(0)
    shared = random.normal(size=300)
    means = {"a": 0.5, "b": 0.5 + 0.2, "c": 0.5}
    for name, mean in means.items():
        values = mean + shared + 0.3 * random.normal(size=300) * (name != "a")
        ids = range(300) if name != "c" else range(1, 301)
        draws = bootstrap(ids, ratios({"x/SPICE": (values, None)}))
        folder = make_run(tmp_path / name, {"x/SPICE": values.mean(), "x/vocabulary": 7.0})
        write_draws(folder, draws)
    a, b, c = (read_run(tmp_path / name) for name in "abc")
    heading, row = difference_table(a, b).rows
    assert (heading, row[0]) == (["x"], "SPICE")
    assert float(row[5].removeprefix("+")) == pytest.approx(
        100 * (b.results["x/SPICE"] - a.results["x/SPICE"]), abs=0.01
    )
    low, high = map(float, row[6].strip("[]").split(", "))
    assert 0 < low < float(row[5]) < high
    assert high - low == pytest.approx(100 * 2 * 1.96 * 0.3 / 300**0.5, rel=0.15)  # what both share has cancelled
    assert (row[7], row[8]) == ("0.001", "")
    assert difference_table(b, a).rows[1][5].startswith("-")
    assert difference_table(a, a).rows[1][5:] == ["+0.00", "[0.00, 0.00]", "1.000", "within noise"]
    assert difference_table(a, c).rows[1][5:] == ["", "", "", "of other images"]
    page = write_comparison([a.folder, b.folder], tmp_path / "both").read_text()
    assert "paired bootstrap" in page
    assert json.loads((a.folder / "intervals.json").read_text())["intervals"].keys() == {"x/SPICE"}


def test_seeds_are_a_mean_with_a_deviation(tmp_path):
    for seed, rate, cider in ((0, 1, 0.50), (1, 1, 0.60), (2, 1, 0.70), (0, 2, 0.1), (1, 2, 0.2), (0, 3, 0.9)):
        make_run(tmp_path / f"{seed}{rate}", {"x/CIDEr": cider}, f"seed: {seed}\nmodel: {{lr: {rate}}}\n")
    runs, _ = find_runs([tmp_path])
    (table,) = seed_tables(runs)
    columns = dict(zip(table.header[1:], table.rows[0][1:], strict=True))
    assert columns == {"lr=1, 3 seeds": "60.00 ± 10.00", "lr=2, 2 seeds": "15.00 ± 7.07"}
    assert seed_tables([run for run in runs if run.config["model.lr"] == 3]) == []
    assert "60.00 ± 10.00" in write_comparison([tmp_path], tmp_path).read_text()


def test_settings_that_follow_the_seed_do_not_tell_runs_apart(tmp_path):
    """In the config of a run, as it is written, `data.seed` and others are "${seed}"."""
    cfg = compose("train", [])
    for seed, cider in enumerate((0.5, 0.6, 0.7)):
        cfg.seed = seed
        make_run(tmp_path / f"seed={seed}", {"scenes/CIDEr": cider}, OmegaConf.to_yaml(cfg))
    runs, _ = find_runs([tmp_path])
    assert runs[2].config["data.seed"] == 2
    assert differences(runs) == {"seed": [0, 1, 2]}
    assert swept_value(runs) is None
    assert seed_tables(runs)[0].rows == [["built-in scenes CIDEr", "60.00 ± 10.00"]]
    assert "60.00 ± 10.00" in write_comparison([tmp_path], tmp_path).read_text()


def test_a_key_that_another_one_ends_with_stays_whole(tmp_path, capsys):
    for seed in (0, 1, 2):
        make_run(tmp_path / f"{seed}", {"x/CIDEr": 0.5}, f"seed: {seed}\ndata: {{seed: {seed + 5}}}\n")
    assert runs_table(find_runs([tmp_path])[0], [], None).header[1:3] == ["seed", "data.seed"]
    print_jobs([{"job": f"{s}", "seed": f"{s}", "data.seed": f"{s}", "status": "ok"} for s in (0, 1)], "", None, None)
    assert "seed   data.seed   status" in capsys.readouterr().out


class Evil:
    """Fails the test when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("draws.npz was unpickled",)


def test_damaged_draws_are_one_sentence(tmp_path):
    folder = make_run(tmp_path / "run", {"x/CIDEr": 0.5})
    wrong = io.BytesIO()
    parts = {"scores": np.array(["x"]), "units": np.array(["y"]), "points": np.array([0.5])}
    np.savez(wrong, **parts, values=np.array([["a"]]))
    pickled = io.BytesIO()
    np.savez(pickled, **parts | {"scores": np.array([Evil()], dtype=object)}, values=np.array([[0.5]]))
    for content in (b"no archive", wrong.getvalue(), wrong.getvalue()[:100], pickled.getvalue()):
        (folder / "draws.npz").write_bytes(content)
        with pytest.raises(SystemExit, match=r"error: .*draws\.npz does not hold the resampled scores of a run"):
            report([str(folder)])


@pytest.mark.parametrize(
    ("score", "value", "name", "printed"),
    [
        ("mscoco/t2i_recall@5", 0.5, "text to image recall@5, %", "50.00"),
        ("mscoco/i2t_median_rank", 3.0, "image to text median rank", "3.0"),
        ("scenes/reranked_i2t_recall@1", 0.5, "image to text recall@1 after re-ranking, %", "50.00"),
        ("mscoco/Bleu_4", 0.409, "BLEU-4", "40.90"),
        ("mscoco/mean_length", 9.876, "words per caption", "9.9"),
        ("mscoco/CIDEr", None, "CIDEr", ""),
        ("nocaps/in-domain/CIDEr", 1.2345, "CIDEr", "123.45"),
        ("choices/colour_accuracy", 0.5, "accuracy on colour, %", "50.00"),
        ("imagenet/linear/top1", 0.5, "top-1, %", "50.00"),
        ("mine/words", 10.5, "words", "10.50"),
    ],
)
def test_names_and_units(score, value, name, printed):
    assert (score_name(score), cell(score, value)) == (name, printed)


def test_final_score_is_a_star_over_its_curve(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_png", drawn.append)
    early = {"scenes_256/CIDEr": [(10, 0.2), (20, 0.4)]}
    curves_figure({**early, "scenes/CIDEr": [(30, 0.9)], "scenes/top1": [(30, 0.5)], "train/caption_loss": [(1, 2.0)]})
    (figure,) = drawn
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    few, every = "built-in scenes CIDEr, first 256 images", "built-in scenes CIDEr, all images"
    (join,) = [name for name in lines if name.startswith("_")]
    assert {*lines} - {join} == {"train/caption_loss", few, every}  # top1 is a number, and no curve
    assert lines[few].get_color() == lines[every].get_color() == lines[join].get_color()
    assert (lines[every].get_marker(), lines[few].get_marker()) == ("*", ".")
    assert lines[few].get_xydata().tolist() == [[10, 20], [20, 40]]  # times 100, as in the tables
    assert lines[join].get_xydata().tolist() == [[20, 40], [30, 90]]


def test_sweep_is_a_curve_over_the_swept_value(tmp_path):
    for i, rate in enumerate(("1e-4", "1e-3", "1e-2")):
        make_run(tmp_path / f"job{i}", {"scenes/CIDEr": i / 10}, f"name: {i}\nmodel: {{lr: {rate}, depth: 2}}\n")
    runs, failed = find_runs([tmp_path])
    assert failed == {}
    assert differences(runs) == {"model.lr": ["1e-4", "1e-3", "1e-2"]}
    assert swept_value(runs) == ("model.lr", [1e-4, 1e-3, 1e-2])
    page = write_comparison([tmp_path], tmp_path).read_text()
    assert "model.lr" in page
    assert (tmp_path / "comparison.png").read_bytes().startswith(PNG)


def test_runs_of_one_name_are_told_apart_by_the_folder_above(tmp_path):
    for sweep, score, error in (("a", 0.5, "disk is full"), ("b", 0.9, "out of memory")):
        make_run(tmp_path / sweep / "seed=0", {"scenes/CIDEr": score})
        (tmp_path / sweep / "seed=1").mkdir()
        (tmp_path / sweep / "seed=1" / "job.json").write_text(json.dumps({"status": "failed", "error": error}))
    runs, failed = find_runs([tmp_path / "a", tmp_path / "b"])
    assert [run.name for run in runs] == ["a/seed=0", "b/seed=0"]
    assert failed == {"a/seed=1": "disk is full", "b/seed=1": "out of memory"}
    write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path)
    assert "best built-in scenes CIDEr: 90.00 (b/seed=0)" in (tmp_path / "report.md").read_text()


def test_rows_without_a_step_and_an_incomplete_line_are_not_drawn(tmp_path):
    folder = make_run(tmp_path / "run", {"scenes/CIDEr": 0.5})
    (folder / "metrics.csv").write_text("step,epoch,train/caption_loss\n1,0,2.5\n,,7.0\n2,0,1.5\n3,0,1.")
    assert read_run(folder).curves == {"train/caption_loss": [(1, 2.5), (2, 1.5)]}


def test_samples_from_anywhere_load_and_run_nothing(tmp_path):
    bad = """x" onerror="alert(1)"""
    confusion = [{"image": bad, "class": "a", "taken_for": "b", "images": "<script>", "of": "<script>"}]
    attention = [{"image": "https://example.com/a.png", "words": [{"map": bad, "word": "a"}]}]
    page = write_report(
        make_run(tmp_path / "run", {"a/CIDEr": 1.0}, a_confusion=confusion, a_attention=attention)
    ).read_text()
    assert not re.search("onerror|<script>|example.com", page)
    assert "&lt;script&gt; of &lt;script&gt;" in page


def test_failed_jobs_are_on_the_comparison_page(tmp_path):
    make_run(tmp_path / "lr=1", {"scenes/CIDEr": 0.5})
    for name, record in (("lr=1", {"status": "ok"}), ("lr=9", {"status": "failed", "error": "loss is not finite"})):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra" / "job.json").write_text(json.dumps(record))
    page = write_comparison([tmp_path], tmp_path).read_text()
    assert "<b>lr=9</b>: loss is not finite" in page
    assert "## failed\n\n- lr=9: loss is not finite" in (tmp_path / "report.md").read_text()
    (tmp_path / "lr=1" / ".hydra" / "job.json").write_text('{"status": "failed", "error": "disk is full"}')
    with pytest.raises(DataError, match="no run is finished; lr=1: disk is full"):
        write_comparison([tmp_path], tmp_path)


LONG = "the loss is not finite in step 7, " * 10
JOBS = [
    {"job": f"model.optimizer.lr={rate}", "model.optimizer.lr": rate, "seed": "1", "model.net.pooler_queries": queries}
    | ({"status": "failed", "error": LONG} if rate == "9" else {"status": "ok", **scores})
    for rate, queries in (("0.1234567890123", "8"), ("9", "8"), ("0.3", "16"))
    for scores in [{f"{data}/{s}": 0.5 for data in ("scenes", "new_pairs") for s in ("t2i_recall@1", "CIDEr", "SPICE")}]
]


@pytest.mark.parametrize("terminal", [True, False])
def test_table_of_a_sweep_fits_a_terminal_and_is_never_folded(terminal, monkeypatch, capsys):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    print_jobs(JOBS, "outputs/sweep", "new_pairs/CIDEr", JOBS[0]["job"])
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    table = [line for line in shown[1:] if not line.startswith(("failed: ", "results.csv "))]
    assert max(map(len, table)) <= 80 or not terminal
    head = next(line for line in table if "status" in line).split()
    assert head[:5] == ["lr", "pooler_queries", "status", "new_pairs/CIDEr", "scenes/CIDEr"]  # seed does not vary
    assert ("scenes/t2i_recall@1" in head) is not terminal
    rows = [line.split() for line in table if "ok" in line or "failed" in line]
    assert rows == [
        ["0.1235", "8", "ok", *["50.00"] * (len(head) - 3)],
        ["9", "8", "failed"],
        ["0.3", "16", "ok", *["50.00"] * (len(head) - 3)],
    ]
    assert f"failed: lr=9, pooler_queries=8: {LONG.strip()}" in shown


def test_headline_is_the_first_of_its_kind():
    assert headline(["x/SPICE", "x/t2i_recall@1", "x/CIDEr"]) == "x/CIDEr"
    assert headline(["x/SPICE", "x/exact_match", "x/t2i_recall@1"]) == "x/t2i_recall@1"
    assert headline(["x/SPICE"]) is None


def test_tiles_are_one_of_each_kind_and_none_is_reranked():
    recalls = [f"{data}/{way}_recall@1" for data in ("mscoco", "flickr30k") for way in ("t2i", "i2t", "reranked_t2i")]
    scores = [*recalls, "mscoco/CIDEr", "nocaps/CIDEr", "nocaps/in-domain/CIDEr", "mscoco/SPICE", "imagenet/top1"]
    assert headlines_of(scores, 5) == [
        *("mscoco/CIDEr", "nocaps/CIDEr", "mscoco/t2i_recall@1", "mscoco/i2t_recall@1", "imagenet/top1"),
    ]
    assert headlines_of([f"set{i}/top1" for i in range(9)], 5) == [f"set{i}/top1" for i in range(5)]


def test_reranked_scores_have_a_section_of_their_own(tmp_path):
    scores = {f"mscoco/{kind}{way}_recall@1": 0.5 for kind in ("", "reranked_") for way in ("t2i", "i2t")}
    (table,) = score_tables(read_run(make_run(tmp_path / "run", scores)))
    assert [row[0] for row in table.rows if len(row) == 1] == ["retrieval", "retrieval re-ranked by the decoder"]


def test_the_page_names_things_as_users_know_them(tmp_path):
    config = "model: {net: {name: coca_vit_b32}}\nroots: {flickr8k: data/flickr8k}\n"
    config += "data: {_target_: a.FlickrDataModule, root: '${roots.flickr8k}'}\n"
    folder = make_run(tmp_path / "mine", {"flickr8k/CIDEr": 0.5, "flickr8k/CLIPScore": 0.7}, config)
    facts = {"experiment": "flickr8k", "parameters": {"text encoder": 1_200_000}, "command": "coca-train name=mine"}
    (folder / "environment.json").write_text(json.dumps(facts))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    page = write_report(folder).read_text()
    for text in (
        "<title>flickr8k: mine</title>",
        "<span>training data</span> Flickr8k",
        "<span>model</span> coca_vit_b32 1.2 M parameters",
        '<a href="checkpoints/last.ckpt">last.ckpt</a>',
        "CLIPScore by the model itself",
    ):
        assert text in page
    assert "[last.ckpt](checkpoints/last.ckpt)" in (folder / "report.md").read_text()


def test_settings_are_readable_and_no_secret_is_looked_up(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret-value")
    for name, size, key in (("a", 224, "x"), ("b", 288, "${oc.env:MY_TOKEN}")):
        config = f"name: {name}\nimage_size: {size}\nmodel: {{net: {{image_size: '${{image_size}}'}}, key: '{key}'}}\n"
        make_run(tmp_path / name, {"x/CIDEr": 0.5}, f"{config}callbacks: {{log: {{dir: '${{output_dir}}/log'}}}}\n")
    runs, _ = find_runs([tmp_path])
    settings = comparison_tables(runs)[0]
    assert settings.rows == [["image_size", "224", "288"], ["model.key", "x", "MY_TOKEN"]]


def test_a_sweep_has_a_line_per_job(tmp_path):
    for rate, cider in (("1e-3", 0.5), ("2e-3", 0.6)):
        folder = tmp_path / f"model.optimizer.lr={rate}"
        make_run(folder, {"scenes/CIDEr": cider, "scenes/top1": 0.5}, f"model: {{optimizer: {{lr: {rate}}}}}\n")
    (table,) = [runs_table(find_runs([tmp_path])[0], ["model.optimizer.lr=9"], "scenes/top1")]
    assert table.header == ["", "lr", "status", "built-in scenes top-1, %", "built-in scenes CIDEr"]
    assert table.rows == [
        ["lr=1e-3", "1e-3", "ok", "50.00", "50.00"],
        ["lr=2e-3", "2e-3", "ok", "50.00", "60.00"],
        ["lr=9", "", "failed", "", ""],
    ]
    assert table.best == [(1, 4)]


def test_the_best_of_a_row_is_marked(tmp_path):
    results = {"a": (0.5, 7.0, 3.0), "b": (0.6, 7.0, 4.0), "c": (0.6, 7.0, 2.0)}
    for name, (cider, words, rank) in results.items():
        scores = {"mscoco/CIDEr": cider, "mscoco/mean_length": words, "mscoco/t2i_median_rank": rank}
        make_run(tmp_path / name, scores)
    page = write_comparison([tmp_path], tmp_path / "compared").read_text()
    assert '<td>50.00</td><td class="best">60.00</td><td class="best">60.00</td>' in page
    assert "<td>3.0</td><td>4.0</td>" in page
    text = (tmp_path / "compared" / "report.md").read_text()
    assert "| CIDEr | 50.00 | **60.00** | **60.00** |" in text
    assert "| words per caption | 7.0 | 7.0 | 7.0 |" in text
    assert "| text to image median rank | 3.0 | 4.0 | **2.0** |" in text


def test_mistakes_are_samples_too():
    records = scene_records("val", count=3)
    captions = {record.id: record.captions[0] for record in records} | {records[1].id: "a dog"}
    (worst,) = worst_captions(records, captions)
    assert worst["caption"] == "a dog"
    assert worst["references"] == list(dict.fromkeys(records[1].captions))
    confused = confusion_samples(records, ["cat", "dog"], [(2, 0, 1), (0, 0, 1), (1, 1, 1)])
    assert [(s["class"], s["taken_for"], s["images"], s["of"]) for s in confused] == [("cat", "dog", 2, 2)]
    assert confused[0]["image"] == thumbnail(records[0].image())


def test_runs_that_differ_in_more_are_bars(tmp_path, capsys):
    folders = [make_run(tmp_path / n, {"scenes/CIDEr": 0.1}, f"seed: {n}\nx: {n}\n") for n in ("1", "2")]
    assert swept_value(find_runs(folders)[0]) is None
    report([*map(str, folders), "--output", str(tmp_path / "both")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "both" / "report.html")
    report([str(folders[0])])
    assert (folders[0] / "report.html").exists()


def test_folder_without_results(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*holds no results\.json"):
        report([str(tmp_path), str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: .*not the folder of a finished run"):
        report([str(tmp_path)])


def test_retrieval_samples_by_hand():
    records = scene_records("val", count=3)
    images = torch.eye(3)
    owner = torch.tensor([0] * 5 + [1] * 5 + [2] * 5)
    texts = torch.tensor([[0.9, 0.5, 0.1]] * 5 + [[0.8, 0.2, 0.1]] * 5 + [[0.0, 0.1, 0.7]] * 5)
    samples = retrieval_samples(records, images, texts, owner, count=3)
    hits = [[answer["hit"] for answer in query["answers"]] for query in samples["text_to_image"]]
    assert hits == [[True, False, False], [False, True, False], [True, False, False]]
    second = samples["image_to_text"][1]["answers"]
    assert [answer["hit"] for answer in second] == [False] * 5  # the texts of image 0 lie nearer to image 1
    assert samples["text_to_image"][0]["text"] == records[0].captions[0]
    (wrong,) = samples["text_to_image_mistakes"]  # five captions of it are wrong alike
    assert wrong["text"] in records[1].captions
    assert len(samples["image_to_text_mistakes"]) == 1


def test_thumbnails():
    small = Image.new("RGB", (32, 20), (1, 2, 3))
    for image, kind, size in ((small, "png", (32, 20)), (small.resize((960, 600)), "jpeg", (240, 150))):
        head, data = thumbnail(image).split(",")
        assert head == f"data:image/{kind};base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == size


def test_gaps_of_two_runs_are_sorted(tmp_path, monkeypatch):
    drawn = []
    png = figures._png
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or png(figure))
    clip = {"a/top1": 0.5, "b/top1": 0.25, "c/top1": 0.75, "d/top1": 0.1, "a/top5": 0.9}
    coca = {"a/top1": 0.45, "b/top1": 0.5, "c/top1": 0.85, "d/top1": 0.1, "a/top5": 0.8}
    folders = [make_run(tmp_path / name, results) for name, results in (("clip", clip), ("coca", coca))]
    page = write_comparison(folders, tmp_path / "compared").read_text()
    (figure,) = drawn  # the accuracies have no bars of their own beside it
    (axes,) = figure.axes
    bars = axes.containers[0]
    assert [bar.get_width() for bar in bars] == pytest.approx([25, 10, 0, -5])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["b  25.0 → 50.0", "c  75.0 → 85.0", "d  10.0 → 10.0", "a  50.0 → 45.0"]
    assert axes.get_title() == "coca against clip: +7.5 points on average"
    assert (tmp_path / "compared" / "zero-shot_gaps.png").read_bytes().startswith(PNG)
    assert "![zero-shot_gaps.png](zero-shot_gaps.png)" in (tmp_path / "compared" / "report.md").read_text()
    assert 'alt="zero-shot gaps"' in page
    few = [make_run(tmp_path / f"few_{f.name}", {"a/top1": 0.5, "b/top1": 0.6}) for f in folders]
    assert figures.gaps(find_runs(few)[0]) == {}  # two data sets are bars of the comparison

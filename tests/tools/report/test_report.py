"""Reports from run folders: complete, self-contained, safe against what captions hold."""

import io
import json
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from coca_lit.cli.command import compose
from coca_lit.data.scenes.render import scene_records
from coca_lit.errors import DataError
from coca_lit.evals.samples import caption_samples, confusion_samples, retrieval_samples, thumbnail, worst_captions
from coca_lit.metrics.uncertainty import Conditions, Draws, Ratios, bootstrap
from coca_lit.runs.results import write_conditions, write_draws
from coca_lit.runs.scores import cell, score_name
from coca_lit.tools.report.command import report
from coca_lit.tools.report.figures import curves_of_runs, swept_value
from coca_lit.tools.report.page import unlike, write_comparison, write_report
from coca_lit.tools.report.runs import differences, find_runs, read_run
from coca_lit.tools.report.tables import (
    PUBLISHED,
    all_scores,
    not_comparable,
    runs_table,
    score_tables,
    seed_tables,
    settings_table,
)
from coca_lit.tools.report.terminal import report_sweep, summary

PNG = b"\x89PNG"
USUAL = Conditions("test", 5000, "images", 25_010, "texts", {})


def make_run(folder, results, config="", conditions=USUAL, **files):
    (folder / "samples").mkdir(parents=True)
    write_conditions(folder, dict.fromkeys(results, conditions))
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
    outside = [source for source in sources if not source.startswith("data:image/")]
    assert outside
    assert all(source.startswith("#") for source in outside)  # the contents; no checkpoint lies there
    assert {source[1:] for source in outside} <= set(re.findall(r'id="([^"]+)"', page))
    assert "http" not in re.sub(r'src="[^"]+"', "", page)
    assert "<script>" not in page  # a caption is text, whatever it holds
    assert "&lt;script&gt;" in page
    texts = ("123.45", "SPICE", "no jars", "a.ckpt", "OpenCLIP CoCa B/32, LAION-2B", "36.18", "1.5 M parameters")
    for text in (*texts, "built-in scenes: retrieval", "the clearest mistakes"):
        assert text in page
    assert (run / "curves.png").read_bytes().startswith(PNG)


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
    mscoco, nocaps = score_tables(read_run(run))
    assert mscoco.header[:3] == ["", "this run", "95 % interval"]
    cider = dict(zip(mscoco.header, next(row for row in mscoco.rows if row[0] == "CIDEr"), strict=True))
    assert cider["this run"] == "123.45"
    assert cider["95 % interval"] == "[119.00, 126.55]"
    assert cider["CoCa 2B, fine-tuned (paper), val split"] == "143.60"
    assert cider["coca_ViT-L-14, fine-tuned, val split"] == "125.30"
    assert "OpenCLIP CoCa report, Table 4 (coca_ViT-L-14, fine-tuned)" in mscoco.note
    assert nocaps.header == ["", "this run", "in-domain", "coca_ViT-L-14, fine-tuned", "CoCa 2B, fine-tuned (paper)"]
    assert nocaps.rows == [["CIDEr", "90.00", "100.00", "106.50", "122.40"]]


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


# Rows of docs/openclip_retrieval_results.csv of OpenCLIP: image and text retrieval of Flickr30k, then of MS-COCO.
OPEN_CLIP = {
    "OpenCLIP CoCa B/32, LAION-2B": (
        "0.6336,0.8566,0.9144,0.8160,0.9570,0.9740,0.3618,0.6136,0.7176,0.5456,0.7788,0.8556"
    ),
    "OpenCLIP CoCa L/14, LAION-2B": (
        "0.7428,0.9202,0.9542,0.8840,0.9930,0.9990,0.4565,0.7042,0.7921,0.6292,0.8370,0.9038"
    ),
    "OpenCLIP CoCa L/14, fine-tuned": (
        "0.7846,0.9452,0.9712,0.8900,0.9870,0.9950,0.5374,0.7779,0.8567,0.6682,0.8762,0.9242"
    ),
}


def test_published_recalls_equal_their_source():
    names = [f"{way}_recall@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)]
    published = json.loads(PUBLISHED.read_text())
    for model, row in OPEN_CLIP.items():
        values = [float(text) for text in row.split(",")]
        for data, expected in (("flickr30k", values[:6]), ("mscoco", values[6:])):
            (scores,) = [entry["scores"] for entry in published[data] if entry["name"] == model]
            assert scores == dict(zip(names, expected, strict=True)), (model, data)


@pytest.mark.parametrize("data", REPORTED)
def test_published_scores_stand_beside_ours(tmp_path, data):
    ours = {f"{data}/{score}": 0.5 for score in REPORTED[data]}
    whole = USUAL._replace(images=50_000)  # no fewer than ImageNet has
    (table,) = score_tables(read_run(make_run(tmp_path / "run", ours, "scoring: {split: test}\n", whole)))
    assert len(set(table.header)) == len(table.header)
    columns = list(zip(*[row for row in table.rows if len(row) > 1], strict=True))
    for expected in (REPORTED[data], OTHERS[data]):
        shown = tuple(f"{expected[score]:.2f}" if score in expected else "" for score in REPORTED[data])
        assert shown in columns
    assert "Published: " in table.note


def test_published_scores_of_a_whole_set_do_not_stand_beside_those_of_a_few_images(tmp_path):
    for images, shown in ((64, False), (5000, True)):
        few = USUAL._replace(images=images)
        folder = make_run(tmp_path / str(images), {"mscoco/t2i_recall@1": 0.5}, conditions=few)
        assert ("OpenCLIP CoCa B/32" in str(score_tables(read_run(folder)))) is shown


def test_zero_shot_scores_do_not_stand_beside_those_of_a_probe(tmp_path):
    (table,) = score_tables(
        read_run(make_run(tmp_path / "run", {"imagenet/linear/top1": 0.7, "imagenet/knn/top1": 0.6}))
    )
    assert len(table.header) == 3
    assert "Published" not in table.note


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
        draws = bootstrap(ids, Ratios({"x/SPICE": (values, None)}))
        conditions = USUAL if name != "c" else USUAL._replace(image_digest="others")
        folder = make_run(tmp_path / name, {"x/SPICE": values.mean(), "x/vocabulary": 7.0}, conditions=conditions)
        write_draws(folder, draws)
    a, b, c = (read_run(tmp_path / name) for name in "abc")
    table = all_scores([a, b])
    heading, row, words = table.rows
    assert (heading, row[0], words) == (["x, 5,000 images"], "SPICE", ["different words", "7", "", "7", *[""] * 5])
    assert table.best == [(1, 3)]  # b, and only where the test says so
    assert float(row[5].removeprefix("+")) == pytest.approx(
        100 * (b.results["x/SPICE"] - a.results["x/SPICE"]), abs=0.01
    )
    low, high = map(float, row[6].strip("[]").split(", "))
    assert 0 < low < float(row[5]) < high
    assert high - low == pytest.approx(100 * 2 * 1.96 * 0.3 / 300**0.5, rel=0.15)  # what both share has cancelled
    assert (row[7], row[8]) == ("0.001", "b is better")
    assert all_scores([b, a]).rows[1][5].startswith("-")
    assert all_scores([a, a]).rows[1][5:] == ["+0.00", "", "1.000", "within noise"]
    assert all_scores([a, a]).best == []
    assert all_scores([a, c]).rows[1][5:] == ["", "", "", "not comparable"]
    assert all_scores([a, c]).best == []
    page = write_comparison(*find_runs([a.folder, b.folder]), tmp_path / "both").read_text()
    assert "paired bootstrap" in page
    assert json.loads((a.folder / "intervals.json").read_text())["intervals"].keys() == {"x/SPICE"}


def test_draws_that_no_test_compares_have_no_verdict(tmp_path):
    """Folds of other sizes, and a score that no resample has."""
    for name, size in (("a", 30), ("b", 20)):
        draws = bootstrap(range(size), Ratios({"x/folds/t2i_recall@1": (np.arange(size) < 15.0, None)}))
        draws["x/rare"] = Draws(np.full(1000, np.nan), 0.5, "x")
        write_draws(make_run(tmp_path / name, dict.fromkeys(draws, 0.5)), draws)
    table = all_scores([read_run(tmp_path / name) for name in "ab"])
    verdicts = {row[0]: row[5:] for row in table.rows if len(row) > 1}
    assert verdicts == {"text to image recall@1, %": ["", "", "", "not comparable"], "rare": [""] * 4}


@pytest.mark.parametrize("curve", ["coco_2014", "coco_2014_256"])
def test_a_name_that_ends_in_a_number_is_no_number_of_images(tmp_path, curve):
    for name in "ab":
        folder = make_run(tmp_path / name, {"coco_2014/CIDEr": 0.1})
        (folder / "metrics.csv").write_text(f"step,epoch,{curve}/CIDEr\n1,0,0.2\n2,0,0.1\n")
    assert curves_of_runs([read_run(tmp_path / name) for name in "ab"]).keys() == {"coco_2014, CIDEr"}


def test_seeds_are_a_mean_with_a_deviation(tmp_path):
    for seed, rate, cider in ((0, 1, 0.50), (1, 1, 0.60), (2, 1, 0.70), (0, 2, 0.1), (1, 2, 0.2), (0, 3, 0.9)):
        make_run(tmp_path / f"{seed}{rate}", {"x/CIDEr": cider}, f"seed: {seed}\nmodel: {{lr: {rate}}}\n")
    runs, _ = find_runs([tmp_path])
    (table,) = seed_tables(runs)
    columns = dict(zip(table.header[1:], table.rows[0][1:], strict=True))
    assert columns == {"lr=1, 3 seeds": "60.00 ± 10.00", "lr=2, 2 seeds": "15.00 ± 7.07"}
    assert seed_tables([run for run in runs if run.config["model.lr"] == 3]) == []
    assert "60.00 ± 10.00" in write_comparison(*find_runs([tmp_path]), tmp_path).read_text()
    (tmp_path / "21" / "results.json").write_text('{"x/SPICE": 0.2}')  # without CIDEr
    (table,) = seed_tables(find_runs([tmp_path])[0])
    assert table.rows[0][1] == "55.00 ± 7.07 (2 seeds)"


def test_settings_that_follow_the_seed_do_not_tell_runs_apart(tmp_path):
    """In the config of a run, as it is written, `data.seed` and others are "${seed}"."""
    cfg = compose("train", [])
    for seed, cider in enumerate((0.5, 0.6, 0.7)):
        cfg.seed = seed
        make_run(tmp_path / f"seed={seed}", {"scenes/CIDEr": cider}, OmegaConf.to_yaml(cfg))
    runs, _ = find_runs([tmp_path])
    assert differences(runs) == {"seed": [0, 1, 2]}
    assert swept_value(runs) is None
    assert seed_tables(runs)[0].rows == [["built-in scenes CIDEr", "60.00 ± 10.00"]]
    assert "60.00 ± 10.00" in write_comparison(*find_runs([tmp_path]), tmp_path).read_text()


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
        with pytest.raises(SystemExit, match=r"error: .*draws\.npz"):
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
        ("mscoco/CIDEr", -1e-5, "CIDEr", "0.00"),
        ("nocaps/in-domain/CIDEr", 1.2345, "CIDEr", "123.45"),
        ("choices/colour_accuracy", 0.5, "accuracy on colour, %", "50.00"),
        ("imagenet/linear/top1", 0.5, "top-1, %", "50.00"),
        ("mine/words", 10.5, "words", "10.5000"),
    ],
)
def test_names_and_units(score, value, name, printed):
    assert (score_name(score), cell(score, value)) == (name, printed)


def test_runs_of_one_name_are_told_apart_by_the_folder_above(tmp_path):
    for sweep, score, error in (("a", 0.5, "disk is full"), ("b", 0.9, "out of memory")):
        make_run(tmp_path / sweep / "seed=0", {"scenes/CIDEr": score})
        (tmp_path / sweep / "seed=1").mkdir()
        (tmp_path / sweep / "seed=1" / "job.json").write_text(json.dumps({"status": "failed", "error": error}))
    runs, failed = find_runs([tmp_path / "a", tmp_path / "b"])
    assert [run.name for run in runs] == ["a/seed=0", "b/seed=0"]
    assert failed == {"a/seed=1": "disk is full", "b/seed=1": "out of memory"}
    make_run(tmp_path / "c" / "seed=0", {"scenes/CIDEr": 0.7})
    write_comparison(*find_runs([tmp_path / "a", tmp_path / "b", tmp_path / "c"]), tmp_path)
    assert "best built-in scenes CIDEr: 90.00 (b/seed=0)" in (tmp_path / "report.md").read_text()


def test_what_a_run_left_before_it_was_started_afresh_is_no_run_of_its_own(tmp_path):
    make_run(tmp_path / "x" / "earlier_1", {"scenes/CIDEr": 0.5})
    with pytest.raises(DataError, match=r"results\.json"):
        find_runs([tmp_path / "x"])
    runs, _ = find_runs([tmp_path / "x" / "earlier_1"])
    assert [run.name for run in runs] == ["earlier_1"]


def test_rows_without_a_step_and_an_incomplete_line_are_not_drawn(tmp_path):
    folder = make_run(tmp_path / "run", {"scenes/CIDEr": 0.5})
    (folder / "metrics.csv").write_text("step,epoch,train/caption_loss\n1,0,2.5\n,,7.0\n2,0,1.5\n3,0,1.")
    assert read_run(folder).curves == {"train/caption_loss": [(1, 2.5), (2, 1.5)]}


def test_samples_from_anywhere_load_and_run_nothing(tmp_path):
    bad = """x" onerror="alert(1)"""
    confusion = [{"image": bad, "class": "<script>", "taken_for": "b", "images": 1, "of": 2}]
    attention = [{"image": "https://example.com/a.png", "words": [{"map": bad, "word": "a"}]}]
    page = write_report(
        make_run(tmp_path / "run", {"a/CIDEr": 1.0}, a_confusion=confusion, a_attention=attention)
    ).read_text()
    assert not re.search("onerror|<script>|example.com", page)
    assert "<td>&lt;script&gt;</td>" in page
    assert "the patches attended to" in page


def test_failed_jobs_are_on_the_comparison_page(tmp_path):
    make_run(tmp_path / "lr=1", {"scenes/CIDEr": 0.5})
    for name, record in (("lr=1", {"status": "ok"}), ("lr=9", {"status": "failed", "error": "loss is not finite"})):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "job.json").write_text(json.dumps(record))
    page = write_comparison(*find_runs([tmp_path]), tmp_path).read_text()
    assert "<b>lr=9</b>: loss is not finite" in page
    assert "## failed\n\n- lr=9: loss is not finite" in (tmp_path / "report.md").read_text()
    make_run(tmp_path / "lr=2", {"scenes/CIDEr": 0.6})
    (tmp_path / "lr=2" / "job.json").write_text('{"status": "ok"}')
    (tmp_path / "lr=2" / "results.json").unlink()
    runs, others = find_runs([tmp_path])
    assert ([run.name for run in runs], others["lr=2"]) == (["lr=1"], "it goes on after its sweep and has not ended")
    (tmp_path / "lr=1" / "job.json").write_text('{"status": "failed", "error": "disk is full"}')
    with pytest.raises(DataError, match="lr=1: disk is full"):
        write_comparison(*find_runs([tmp_path]), tmp_path)


def test_settings_are_readable_and_no_secret_is_looked_up(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret-value")
    for name, size, key in (("a", 224, "x"), ("b", 288, "${oc.env:MY_TOKEN}")):
        config = f"name: {name}\nimage_size: {size}\nmodel: {{net: {{image_size: '${{image_size}}'}}, key: '{key}'}}\n"
        make_run(tmp_path / name, {"x/CIDEr": 0.5}, f"{config}callbacks: {{log: {{dir: '${{output_dir}}/log'}}}}\n")
    runs, _ = find_runs([tmp_path])
    settings = settings_table(runs)
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


def test_a_sweep_without_scores_has_a_line_per_job(tmp_path, capsys):
    make_run(tmp_path / "seed=0", {})
    rows = [{"job": "seed=0", "seed": "0", "status": "ok"}, {"job": "seed=1", "seed": "1", "status": "stopped"}]
    report_sweep(tmp_path, rows, None)
    said = capsys.readouterr().out
    assert re.search(r"^seed=0 .*ok$", said, re.MULTILINE)
    assert "failed: seed=1: stopped" in said
    assert "best" not in said


def test_scores_of_ones_own_stand_where_headline_scores_would(tmp_path):
    for name, right in (("a", 0.25), ("b", 0.75), ("c", 0.5)):
        make_run(tmp_path / name, {"mine/right": right, "mine/left": 1 - right})
    runs = find_runs([tmp_path])[0]
    assert runs_table(runs, [], None).header == ["", "status", "mine right", "mine left"]
    assert runs_table(runs, [], "mine/left").header == ["", "status", "mine left", "mine right"]
    assert [line.split()[:2] for line in summary(runs[:1], {}).splitlines()] == [
        ["right", "0.2500"],
        ["left", "0.7500"],
    ]
    assert "right  0.2500  0.7500" in summary(runs[:2], {})


def test_mistakes_are_samples_too():
    records = scene_records("val", count=3)
    captions = {record.id: record.captions[0] for record in records} | {records[1].id: "a dog"}
    (worst,) = worst_captions(records, captions)
    assert worst["caption"] == "a dog"
    assert worst["references"] == list(dict.fromkeys(records[1].captions))
    confused = confusion_samples(records, ["cat", "dog"], [(2, 0, 1), (0, 0, 1), (1, 1, 1)])
    assert [(s["class"], s["taken_for"], s["images"], s["of"]) for s in confused] == [("cat", "dog", 2, 2)]
    assert confused[0]["image"] == thumbnail(records[0].image())


def test_folder_without_results(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*results\.json"):
        report([str(tmp_path), str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: .*results\.json"):
        report([str(tmp_path)])


def test_the_report_of_one_run_goes_nowhere_else(tmp_path, capsys):
    make_run(tmp_path / "run", {"x/CIDEr": 0.1})
    with pytest.raises(SystemExit):
        report([str(tmp_path / "run"), "--output", str(tmp_path / "page")])
    assert "--output" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


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


OTHERS_OF = {  # what differs -> conditions, whether the paired test is possible
    "split": (USUAL._replace(split="val", images=512, image_digest="val"), False),
    "the first images": (USUAL._replace(images=64, image_digest="first"), False),
    "images of one number and name": (USUAL._replace(image_digest="others"), False),
    "candidates": (USUAL._replace(texts=5000, text_digest="one each"), False),
    "generation": (USUAL._replace(settings={"generate.strategy": "beam"}), True),
    "not recorded": (None, False),
}


@pytest.mark.parametrize("what", OTHERS_OF)
def test_scores_of_other_conditions_are_never_won(tmp_path, what):
    """By hand: b has 100 right of 100, a none, which any test would call different."""
    other, testable = OTHERS_OF[what]
    for name, right, conditions in (("a", 0.0, USUAL), ("b", 1.0, other), ("c", 1.0, other)):
        folder = make_run(tmp_path / name, {"x/exact_match": right}, conditions=conditions or USUAL)
        write_draws(folder, bootstrap(range(100), Ratios({"x/exact_match": (np.full(100, right), None)})))
        if conditions is None:
            (folder / "conditions.json").unlink()
    runs = [read_run(tmp_path / name) for name in "abc"]
    table = all_scores(runs[:2])
    assert table.best == []
    assert table.rows[1][-1] == "not comparable"
    assert bool(table.rows[1][5]) == testable
    assert not_comparable(runs[:2]).keys() == {"x"}
    for folders in (runs[:2], runs):
        page = write_comparison(*find_runs([run.folder for run in folders]), tmp_path / "compared")
        assert 'class="best"' not in page.read_text()
        assert "not comparable" in page.read_text()
        assert "best x" not in page.read_text()
        assert "**1" not in (tmp_path / "compared" / "report.md").read_text()
    assert "not comparable" in summary(runs[:2], {})
    assert "better" not in summary(runs[:2], {})
    assert "†" in summary(runs, {})


def test_models_that_judge_themselves_are_not_compared(tmp_path):
    for name, judge in (("a", None), ("b", None), ("c", "clip.bin"), ("d", "clip.bin")):
        make_run(tmp_path / name, {"x/CLIPScore": 0.5}, conditions=USUAL._replace(settings={"judge": judge}))
    a, b, c, d = (read_run(tmp_path / name) for name in "abcd")
    assert not_comparable([a, b]).keys() == not_comparable([a, c]).keys() == {"x"}
    assert not_comparable([c, d]) == {}


def test_scores_come_before_settings(tmp_path):
    target = "coca_lit.evals.Settings"
    make_run(tmp_path / "a", {"x/CIDEr": 0.5}, f"s: {{_target_: {target}, rerank: 0}}\nseed: 1\n")
    make_run(tmp_path / "b", {"x/CIDEr": 0.6}, f"s: {{_target_: {target}, rerank: 4}}\nseed: 1\n")
    page = write_comparison(*find_runs([tmp_path]), tmp_path / "both").read_text()
    page = page.partition("</nav>")[2]
    assert page.index(">scores<") < page.index('alt="comparison"') < page.index("settings that differ")
    assert "_target_" not in page


def test_an_evaluation_has_not_the_settings_of_a_training(tmp_path):
    make_run(tmp_path / "a", {"x/CIDEr": 0.5}, "trainer: {max_steps: 3}\nscoring: {split: val}\n")
    make_run(tmp_path / "b", {"x/CIDEr": 0.6}, "checkpoint: a\nscoring: {split: test}\n")
    assert settings_table(find_runs([tmp_path])[0]).rows == [["scoring.split", "val", "test"]]


def test_words_that_no_reference_bears_out_are_marked():
    references = ["a small red circle left of a blue square", "A blue square right of a small red circle."]
    marked = [word for word, odd in unlike("a small blue circle left of a red square", references) if odd]
    assert marked == ["blue", "red", "square"]  # all are there, beside other words
    assert not any(odd for _, odd in unlike("square", references))
    assert not any(odd for _, odd in unlike("A small red circle, left of a blue square", references))
    assert unlike("dog", references) == [("dog", True)]
    spelt = ["A man in a T-shirt by men's shoes and 10 cars."]
    assert not any(odd for _, odd in unlike("a man in a t - shirt by men 's shoes and 1 0 cars .", spelt))
    assert unlike("", references) == []

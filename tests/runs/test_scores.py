"""Scores as they are printed."""

import numpy as np

from coca_lit.metrics.uncertainty import Draws
from coca_lit.runs.scores import headline, headlines_of, own_scores, print_scores


def test_scores_are_printed_for_one_data_set_after_the_other(capsys):
    draws = {"mscoco/CIDEr": Draws(np.linspace(1.1, 1.3, 1001), 1.2, "images")}
    print_scores({"mscoco/CIDEr": 1.2, "mscoco/t2i_recall@1": 0.5, "nocaps/in-domain/CIDEr": 1.125}, draws)
    out = capsys.readouterr().out
    assert "MSCOCO\n  CIDEr                      120.00  [110.50, 129.50]\n  text to image recall@1, %   50.00\n" in out
    assert "NoCaps, in-domain\n  CIDEr  112.50\n" in out
    assert max(map(len, out.splitlines())) <= 80


def test_names_of_scores_cannot_control_the_terminal(capsys):
    print_scores({"a\x1b[2Jb/x\x9by": 3.0, "plain": 1.0}, {})
    out = capsys.readouterr().out
    assert not {"\x1b", "\x9b"} & {*out}
    assert "all images" in out


def test_headline_is_the_first_of_its_kind():
    assert headline(["x/SPICE", "x/t2i_recall@1", "x/CIDEr"]) == "x/CIDEr"
    assert headline(["x/SPICE", "x/exact_match", "x/t2i_recall@1"]) == "x/t2i_recall@1"
    assert headline(["x/Bleu_4"]) is None


def test_tiles_are_one_of_each_kind_and_none_is_reranked():
    recalls = [f"{data}/{way}_recall@1" for data in ("mscoco", "flickr30k") for way in ("t2i", "i2t", "reranked_t2i")]
    scores = [*recalls, "mscoco/CIDEr", "nocaps/CIDEr", "nocaps/in-domain/CIDEr", "mscoco/SPICE", "imagenet/top1"]
    assert headlines_of(scores, 5) == [
        *("mscoco/CIDEr", "nocaps/CIDEr", "mscoco/t2i_recall@1", "mscoco/i2t_recall@1", "imagenet/top1")
    ]
    assert headlines_of([f"set{i}/top1" for i in range(9)], 5) == [f"set{i}/top1" for i in range(5)]


def test_scores_of_ones_own_are_shown_where_there_is_no_headline():
    assert own_scores(["mine/right", "mine/left"]) == ["mine/right", "mine/left"]
    assert own_scores([f"mine/{i}" for i in range(9)]) == [f"mine/{i}" for i in range(6)]
    assert own_scores(["mine/right", "x/CIDEr"]) == []
    assert own_scores(["imagenet/knn/top1"]) == ["imagenet/knn/top1"]  # of a probe


def test_a_score_says_which_model_judged(capsys):
    scores = {"a/CLIPScore": 0.5, "b/CLIPScore": 0.5, "b/CIDEr": 1.0}
    print_scores(scores, {}, judges={"a/CLIPScore": None, "b/CLIPScore": "clip.pt"})
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  CLIPScore by the model itself") for line in lines)
    assert any(line.startswith("  CLIPScore by clip.pt") for line in lines)
    assert any(line.split()[0] == "CIDEr" and "by" not in line for line in lines if line.strip())

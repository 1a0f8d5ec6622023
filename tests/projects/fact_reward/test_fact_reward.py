"""The reward of facts, counted by hand, and that training by it raises it."""

from pathlib import Path

import pytest

from coca_lit.projects.fact_reward.reward import FactReward
from coca_lit.projects.rewards.self_critical import END
from helpers.running import run

TRUE = "a small red circle to the left of a large blue star"  # 2 objects, 4 attributes, 1 relation
FACTS = 7


@pytest.mark.parametrize(
    ("caption", "right", "false"),
    [
        (TRUE, 7, 0),
        ("a large blue star to the right of a small red circle", 7, 0),
        ("a large blue star to the left of a small red circle", 6, 1),
        ("a small red circle to the left of a large pink star", 5, 2),  # the colour, and so the pair
        ("a circle to the left of a star", 3, 0),
        ("a red circle", 2, 0),
        ("a red circle by a red circle", 2, 2),  # a second circle and a second red one
        ("", 0, 0),
    ],
)
def test_by_hand(caption: str, right: int, false: int) -> None:
    references = {"0": [[*TRUE.split(), END]]}
    words = caption.split()
    strict, lenient = FactReward(references), FactReward(references, penalty=0.25)
    assert strict("0", [[*words, END], words]) == pytest.approx([(right - false) / FACTS, 0.0])
    assert lenient("0", [[*words, END]]) == pytest.approx([(right - 0.25 * false) / FACTS])


@pytest.mark.slow
def test_a_run(tmp_path: Path) -> None:
    run(tmp_path / "run", "experiment=scenes_fact_reward", "init_from=null", "trainer=smoke", "evals=[]")
    assert "train/reward" in (tmp_path / "run" / "metrics.csv").read_text()
